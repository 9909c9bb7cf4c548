"""Whether intervals and confirmed fronts are as sure as they say: simulations with known truth.

python -m tests.benchmarks.coverage [--repetitions 1000] [--json FILE]

Quality: losses of a reference are exponential, as surprising as English is; policies differ from it by values whose
correlation falls to 1/e over 1 to 30 tokens: normal, lognormal, or mostly small with a large one in 50 tokens. Times:
pairs of segments under a drifting clock, with bursts of load, and what differs between rounds. Fronts: eight candidates
of five policies, three of the same one and two of another, within 10% in time; or all of one policy within 1%.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streamllm.measuring.certainty import front_probabilities, not_told_from, time_draws, told_apart_front
from streamllm.measuring.quality import Estimate, QualityComparison
from streamllm.measuring.sample import sample_positions

from .reporting import machine

PAIRS, ROUNDS = 14, 4
LARGE_TIME, LARGE_QUALITY = 0.05, 0.6
"""An advantage not to be missed: log time; percent, six standard errors of a difference in the made-up qualities."""
_BATCH = 100


def correlated(random: np.random.Generator, texts: int, tokens: int, length: float) -> np.ndarray:
    """(texts, tokens): standard normal, correlation falling to 1/e over `length` tokens."""
    memory = math.exp(-1 / length)
    values = random.normal(size=(texts, tokens))
    values[:, 1:] *= math.sqrt(1 - memory**2)
    for token in range(1, tokens):
        values[:, token] += memory * values[:, token - 1]
    return values


def differences(random: np.random.Generator, kind: str, texts: int, tokens: int, length: float) -> np.ndarray:
    """(texts, tokens): nats, of mean 0 in truth."""
    normal = correlated(random, texts, tokens, length)
    if kind == "normal":
        return 0.1 * normal
    if kind == "lognormal":
        return 0.1 * (np.exp(0.75 * normal) - math.exp(0.75**2 / 2))
    large = (random.random((texts, tokens)) < 0.02) * np.exp(0.5 * normal)
    return 0.02 * random.normal(size=(texts, tokens)) + 0.3 * (large - 0.02 * math.exp(0.5**2 / 2))


def covers(estimates: list[Estimate], truth: float) -> float:
    return 100 * float(np.mean([estimate.low <= truth <= estimate.high for estimate in estimates]))


def quality_row(tokens: int, kind: str, length: float, sample: int, repetitions: int) -> dict[str, Any]:
    random = np.random.default_rng(tokens + sample)
    positions = np.arange(float(tokens))
    chosen = sample_positions(tokens + 1, 1, sample)
    found: dict[str, list[Estimate]] = {"vs_strict": [], "increase": [], "perplexity": [], "sampled perplexity": []}
    for _ in range(repetitions // _BATCH):
        hidden = correlated(random, _BATCH, tokens, length)
        normal_tail = np.vectorize(lambda x: 0.5 * math.erfc(x / math.sqrt(2)))(np.linspace(-6, 6, 2001))
        reference = -3.0 * np.log(np.interp(hidden, np.linspace(-6, 6, 2001), normal_tail))
        policies = reference + differences(random, kind, _BATCH, tokens, length)
        baselines = reference + 3 * differences(random, kind, _BATCH, tokens, length)
        for r, own, b in zip(reference, policies, baselines, strict=True):
            sampled = np.column_stack((positions, b))[chosen]
            comparison = QualityComparison(np.column_stack((positions, r)), sampled)
            table = np.column_stack((positions, own))
            found["vs_strict"].append(comparison.vs_strict(table))
            found["increase"].append(comparison.increase(table))
            found["perplexity"].append(comparison.perplexity(table))
            found["sampled perplexity"].append(comparison.perplexity(sampled))
    row: dict[str, Any] = {"tokens": tokens, "differences": kind, "correlated over": length, "sample": sample}
    for name, estimates in found.items():
        row[name] = covers(estimates, math.exp(3.0) if "perplexity" in name else 0.0)
    width = np.mean([estimate.high - estimate.low for estimate in found["vs_strict"]])
    row["width / ideal"] = width / (2 * 1.96 * float(np.std([estimate.value for estimate in found["vs_strict"]])))
    return row


@dataclass(frozen=True)
class Load:
    name: str
    bursts: float
    between: float
    """Standard deviation of what differs between rounds, as a share of the time."""
    noisy: float = 1.0
    """How much noisier every other candidate is."""
    shared: float = 0.0
    """Standard deviation of what differs between rounds and is the same for all candidates: the reference's share."""


LOADS = (
    Load("quiet", 0, 0),
    Load("quiet", 0, 0.01),
    Load("quiet", 0, 0.03),
    Load("some noisy", 0, 0.01, 4),
    Load("bursts", 0.3, 0),
    Load("bursts", 0.3, 0.01),
    Load("bursts", 0.3, 0.03),
    Load("always loaded", 1, 0.01),
    Load("reference varies", 0, 0.01, shared=0.02),
    Load("reference varies", 0.3, 0.02, shared=0.02),
)


def measured(random: np.random.Generator, times: np.ndarray, load: Load, pairs: int = PAIRS) -> list[np.ndarray]:
    """Ratios (rounds, pairs) of candidates whose log times are `times`. The clock drifts by up to 2 in a round."""
    found, shared = [], random.normal(0, load.shared, (ROUNDS, 1))
    for index, own in enumerate(times):
        shape = (ROUNDS, 2 * pairs)
        segments = np.linspace(0, random.uniform(-0.7, 0.7, ROUNDS), 2 * pairs, axis=-1)
        segments += np.cumsum(random.normal(0, 0.01, shape), axis=1)
        segments += random.normal(0, 0.03 * (load.noisy if index % 2 else 1), shape)
        segments += np.where(random.random(shape) < load.bursts, np.log(random.uniform(1, 3, shape)), 0)
        of_round = own + random.normal(0, load.between, (ROUNDS, 1)) + shared
        found.append(np.exp(of_round + segments[:, ::2] - segments[:, 1::2]))
    return found


def time_row(load: Load, candidates: int, pairs: int, repetitions: int) -> dict[str, Any]:
    random = np.random.default_rng(1)
    truth = np.linspace(0, 0.5, candidates)
    hits, of_differences, widths, errors, apart = [], [], [], [], []
    for _ in range(repetitions):
        estimates, drawn = time_draws(measured(random, truth, load, pairs), seed=int(random.integers(2**31)))
        low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
        hits.append((low <= truth) & (truth <= high))
        widths.append(high - low)
        errors.append(estimates - truth)
        if candidates > 1:
            low, high = np.quantile(drawn[:, 1] - drawn[:, 0], (0.025, 0.975))
            of_differences.append(low <= truth[1] - truth[0] <= high)
            apart.append(high - low)
    return {
        **{"load": load.name, "between rounds": load.between, "candidates": candidates, "pairs": pairs},
        "even": 100 * float(np.mean(np.array(hits)[:, ::2])),
        "odd": 100 * float(np.mean(np.array(hits)[:, 1::2])) if candidates > 1 else None,
        "differences": 100 * float(np.mean(of_differences)) if candidates > 1 else None,
        "half width": float(np.mean(widths)) / 2,
        "ideal": 1.96 * float(np.std(errors)),
        "half width of differences": float(np.mean(apart)) / 2 if candidates > 1 else None,
    }


@dataclass(frozen=True)
class World:
    """Candidates as they are in truth: log times, qualities in percent, both (k,); which policy each has."""

    times: np.ndarray
    quality: np.ndarray
    policies: np.ndarray

    def dominates(self, one: int, other: int) -> bool:
        time, quality = self.times[other] - self.times[one], self.quality[other] - self.quality[one]
        return bool(time >= 0 and quality >= 0 and (time > 0 or quality > 0))

    def front(self) -> list[int]:
        every = range(len(self.times))
        return [one for one in every if not any(self.dominates(other, one) for other in every)]

    def stands_out(self, one: int) -> bool:
        """Whether it is far better than each other in something."""
        faster, better = self.times - self.times[one] >= LARGE_TIME, self.quality - self.quality[one] >= LARGE_QUALITY
        return int((faster | better).sum()) == len(self.times) - 1


def typical(random: np.random.Generator) -> World:
    policies = np.array([0, 0, 0, 1, 1, 2, 3, 4])
    faster_is_worse = np.sort(random.uniform(-0.4, 0, 5))
    times = faster_is_worse[policies] + random.uniform(0, 0.1, 8) * np.array([0, 1, 1, 0, 1, 0, 0, 0])
    quality = np.sort(random.exponential(1.0, 5))[::-1]
    return World(times, (random.permutation(quality) if random.random() < 0.3 else quality)[policies], policies)


def scattered(random: np.random.Generator) -> World:
    """Where faster is not worse: no more is known of a candidate than what is measured."""
    return World(random.uniform(0, 0.15, 8), random.uniform(0, 0.5, 8), np.arange(8))


def one_policy(random: np.random.Generator) -> World:
    return World(random.uniform(0, 0.01, 8), np.ones(8), np.zeros(8, dtype=int))


def nearly_the_same(random: np.random.Generator) -> World:
    return World(random.uniform(0, 0.01, 8), random.uniform(0, 0.1, 8), np.arange(8))


WORLDS = {
    "typical": typical,
    "scattered": scattered,
    "one policy, 1%": one_policy,
    "all within 1% and 0.1": nearly_the_same,
}


def quality_draws(random: np.random.Generator, world: World) -> tuple[np.ndarray, np.ndarray]:
    """Estimates (k,) and draws (draws, k), percent: 2,000 tokens; policies differ by 0.1 more or less, half shared."""
    count = int(world.policies.max()) + 1
    own = np.zeros(count)
    own[world.policies] = world.quality
    shared, apart = correlated(random, 1, 2000, 3), correlated(random, count, 2000, 3)
    positions = np.arange(2000.0)
    losses = own[:, None] / 100 + 0.02 * (shared + apart) / math.sqrt(2)
    tables = [np.column_stack((positions, one)) for one in losses]
    comparison = QualityComparison(np.column_stack((positions, np.zeros(2000))), seed=int(random.integers(2**31)))
    return 100 * losses.mean(axis=1)[world.policies], 100 * comparison.draws(tables)[:, world.policies]


def front_row(name: str, load: Load, repetitions: int) -> tuple[dict[str, Any], list[tuple[float, bool]]]:
    """What a world's confirmed fronts are like, and each candidate's P(front) beside whether it is on the true one.

    A member is false if it is dominated by one that it is told from: that it is better than that one was said for
    certain. Besides, whether any dominates it, of those it is not told from too; or does so by 2% or 0.2 points."""
    random = np.random.default_rng(2)
    false = dominated = by_far = members = true_members = standing = missed = 0
    probable = []
    for _ in range(repetitions):
        world = WORLDS[name](random)
        log_times, drawn_times = time_draws(measured(random, world.times, load), seed=int(random.integers(2**31)))
        quality, drawn_quality = quality_draws(random, world)
        points = np.stack((drawn_times, drawn_quality), axis=-1)
        probabilities, not_told = front_probabilities(points), not_told_from(points)
        front = told_apart_front(np.column_stack((log_times, quality)), not_told, probabilities)
        true = world.front()
        wrong = [(one, other) for one in front for other in range(len(world.times)) if world.dominates(other, one)]
        false += any(other not in not_told[one] for one, other in wrong)
        dominated += bool(wrong)
        by_far += any(
            world.times[one] - world.times[other] > 0.02 or world.quality[one] - world.quality[other] > 0.2
            for one, other in wrong
        )
        members, true_members = members + len(front), true_members + len(true)
        outstanding = [one for one in true if world.stands_out(one)]
        standing, missed = standing + len(outstanding), missed + len(set(outstanding) - set(front))
        probable += [(float(p), one in true) for one, p in enumerate(probabilities)]
    row = {
        **{"world": name, "load": load.name, "between rounds": load.between},
        "false %": 100 * false / repetitions,
        "dominated by any %": 100 * dominated / repetitions,
        "by 2% or 0.2 %": 100 * by_far / repetitions,
        "members": members / repetitions,
        "true members": true_members / repetitions,
        "outstanding": standing,
        "missed %": 100 * missed / standing if standing else None,
    }
    return row, probable


def calibration(probable: list[tuple[float, bool]]) -> Iterator[dict[str, Any]]:
    """How often candidates of a P(front) are on the true front."""
    values = np.array(probable)
    for low, high in ((0, 0.02), (0.02, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 0.98), (0.98, 1.01)):
        chosen = values[(values[:, 0] >= low) & (values[:, 0] < high)]
        if len(chosen):
            mean, share = chosen.mean(axis=0)
            yield {"P(front)": float(mean), "on the true front": float(share), "candidates": len(chosen)}


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}\n\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(_text(value) for value in row.values()) + " |", flush=True)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    options = argparse.ArgumentParser(description="coverage of intervals, false and missed members of fronts")
    options.add_argument("--repetitions", type=int, default=1000, help="in hundreds; of long texts a third (1000)")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    arguments = options.parse_args()
    count = arguments.repetitions
    quality = []
    for tokens, sample in ((2000, 128), (2000, 1024), (7400, 1024), (23_000, 128), (23_000, 1024)):
        for kind in ("normal", "lognormal", "large ones"):
            for length in (1, 10, 30):
                repetitions = count if tokens < 20_000 else max(count // 3, _BATCH)
                quality.append(quality_row(tokens, kind, length, sample, repetitions))
                print(f"\r{len(quality)} rows", end="", file=sys.stderr, flush=True)
    times = [time_row(load, k, pairs, count if k < 3 else count // 2)
             for load in LOADS for k, pairs in ((1, 12), (2, 14), (9, 12), (9, 24))]  # fmt: skip
    fronts: list[dict[str, Any]] = []
    probable: dict[str, list[tuple[float, bool]]] = {name: [] for name in WORLDS}
    for name in WORLDS:
        for load in (LOADS[0], LOADS[1], LOADS[2], LOADS[5]):
            row, beside = front_row(name, load, count // 2)
            fronts.append(row)
            probable[name] += beside
    tables = {
        "quality, coverage %": quality,
        "times, coverage %": times,
        "fronts": fronts,
        **{f"P(front), {name}": list(calibration(probable[name])) for name in ("scattered", "typical")},
    }
    for title, rows in tables.items():
        show(title, rows)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"benchmark": "coverage", **machine(), **tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
