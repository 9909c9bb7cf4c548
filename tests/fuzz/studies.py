"""A finished study is damaged at random, again and again: whoever reads it shows what can be shown or says in a line
what is wrong, and the same command goes on from it. Each case can be made again from the seed and its number.

`python -m tests.fuzz.studies --seed 7 --minutes 10`; `--case 123` makes one case and leaves its folder there.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from dashboards import pareto, published, report, summarize
from dashboards.loading import load
from dashboards.serve import chosen_studies
from dashboards.tables import frames
from orchestrator.conclusion import keep_front, keep_recommendation
from orchestrator.search.confirm import candidates
from orchestrator.search.rounds import read_rounds
from orchestrator.timing import Calibration, Timing
from orchestrator.workers.kinds import kind_of
from streamllm.errors import UsageError
from streamllm.results.study import load_study

from ..finished_study import TRIALS, configuration_in, go_on, write_finished
from ..made_studies import row

KIND = kind_of({"device": "a GPU", "threads": None, "software": "torch 2"})

FILES = ("trials.jsonl", "journal.log", "sweep.json", "outcome.json", "confirmed.jsonl", "increases.jsonl",
         "rounds.jsonl", "fronts.jsonl", "timing.json", "driver.lock", "../../results/one.json")  # fmt: skip
_VALUES = (None, True, False, 0, -1, 1, 7, 1 << 40, 1 << 70, 0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), "",
           "x", "0", "é", "\ud800", "\0", "a\nb", [], [0], ["x"], [[]], {}, {"trial": 0}, {"": None})  # fmt: skip
_BESIDE = ((2, 1.0), (8, 1.5))
"""Accelerators of a node, and what a timing beside the others takes over one alone."""
_FIGURES_EVERY = 100
"""Cases: drawing takes a hundred times as long as all else."""


@dataclass(frozen=True)
class Failure:
    case: int
    done: tuple[str, ...]
    """What was damaged, and how."""
    error: str
    """The end of a traceback, or what was expected."""


def write_base(folder: Path) -> None:
    """A finished study, with what was found out of its accelerators, and the file of an evaluation."""
    files = write_finished(folder).folder
    ratios = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98]
    found = [Calibration.of(KIND, workers, ratios, [beside * one for one in ratios]) for workers, beside in _BESIDE]
    files.timing.write_text(json.dumps({"nodes": [one.to_json() for one in found if one is not None]}))
    assert len(found) == len(json.loads(files.timing.read_text())["nodes"])
    (folder / "results").mkdir()
    document = {"baseline": row("", 40.0, 0.0), "streaming": row("", 4.0, 2.0), "config": {"n_sink": 4}}
    (folder / "results/one.json").write_text(json.dumps(document))


def cases(seed: int, numbers: Iterator[int], base: Path, work: Path) -> Iterator[Failure | None]:
    """A failure, or None, for each of the numbers. base: a folder with the finished study; work: an empty one."""
    for number in numbers:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(base, work)
        yield _case(random.Random(f"{seed} {number}"), number, work)


def _case(draw: random.Random, number: int, work: Path) -> Failure | None:
    folder = work / "sweeps/s"
    done = [_damaged(draw, folder) for _ in range(draw.choice((1, 1, 1, 2, 4)))]
    before = _content(folder)
    said = StringIO()
    try:
        with chdir(work), redirect_stdout(StringIO()), redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            warnings.simplefilter("ignore", UserWarning)
            _read(draw, number % _FIGURES_EVERY == 0)
            if _content(folder) != before:
                raise AssertionError("who only reads has changed the study")
            _go_on(len(done) == 1)
        _check_lines(said.getvalue())
    except Exception as error:
        last = "".join(traceback.format_exception(error)[-3:]) if not isinstance(error, AssertionError) else str(error)
        return Failure(number, tuple(done), last)
    return None


def _read(draw: random.Random, with_figures: bool) -> None:
    formats = ",".join(draw.sample(("md", "csv", "latex", "json", "html"), 2))
    everything = draw.choice(((), ("--all",)))
    _code(pareto.main(["s", "--output", "tables", "--format", formats, *everything]))
    _code(summarize.main(["results"]))
    _code(pareto.main(["s", "--trace", draw.choice(("0", "2", "5", "baseline", "strict"))]))
    with _one_line():
        found = load("s")
        report.report(found, figures=None if with_figures else [])
        published.published_table(found)
        chosen_studies([])
        candidates(found.trials, found.objectives)
    with _one_line():
        len(frames.load_study("s").trials)


def _go_on(only_one: bool) -> None:
    """The same command goes on, and has what it had, unless it says what is in its way."""
    configuration = configuration_in(Path())
    with _one_line():
        study, _ = go_on(configuration)
        Timing("auto", configuration.folder, lambda _: None).side_by_side(KIND, 2)
        numbers = sorted(one.trial for one in study.rows)
        if only_one and numbers != list(range(TRIALS)):
            raise AssertionError(f"it goes on with the trials {numbers}")
        for trial in filter(None, (study.ask() for _ in range(3))):
            study.died(trial.number)
        read_rounds(configuration.folder)
        found = load_study("s")
        if found.problems:
            raise AssertionError(f"not mended: {found.problems}")
        keep_recommendation(found)
        keep_front(found)
        go_on(configuration)


class _one_line(suppress):  # noqa: N801
    """Takes a UsageError whose message is a line for an answer."""

    def __init__(self) -> None:
        super().__init__(UsageError)

    def __exit__(self, kind, error, trace):  # type: ignore[no-untyped-def]
        if isinstance(error, UsageError):
            _check_lines(f"error: {error}\n")
        return super().__exit__(kind, error, trace)


def _code(code: int) -> None:
    if code not in (0, 2):
        raise AssertionError(f"exit code {code}")


def _check_lines(said: str) -> None:
    for line in said.split("\n")[:-1]:
        if not line.startswith(("warning: ", "error: ")) or len(line) > 1000:
            raise AssertionError(f"no line that says what is wrong: {line[:300]!r}")


def _content(folder: Path) -> dict[str, bytes | None]:
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


def _damaged(draw: random.Random, folder: Path) -> str:
    """Damages a file of the folder. Returns how."""
    path = folder / draw.choice(FILES)
    way = draw.choice((_of_bytes, _of_bytes, _of_lines, _of_json, _of_json, _of_json, _of_file))
    if not path.is_file() and way is not _of_file:
        return f"{path.name}: is none any more"
    return f"{path.name}: {way(draw, path)}"


def _of_bytes(draw: random.Random, path: Path) -> str:
    content = bytearray(path.read_bytes())
    if not content:
        return "is empty"
    start = draw.randrange(len(content))
    end = min(start + draw.choice((1, 1, 2, 10, 100, 5000)), len(content))
    some = bytes(draw.randrange(256) for _ in range(end - start))
    digits = bytes(draw.choice(b'0123456789.-e{}[],:"\\ntruefalse') for _ in range(end - start))
    flipped = bytes([content[start] ^ 1 << draw.randrange(8), *content[start + 1 : end]])
    added = some + bytes(content[start:end])
    name, new = draw.choice((("cut", b""), ("random", some), ("digits", digits), ("zeros", bytes(end - start)),
                             ("added", added), ("a bit", flipped)))  # fmt: skip
    content[start:end] = new
    if draw.random() < 0.1:
        del content[start:]
    path.write_bytes(content)
    return f"bytes {start} to {end}: {name}"


def _of_lines(draw: random.Random, path: Path) -> str:
    lines = path.read_bytes().splitlines(keepends=True)
    others = [one for name in FILES if (path.parent / name).is_file()
              for one in (path.parent / name).read_bytes().splitlines(keepends=True)]  # fmt: skip
    if not lines or not others:
        return "has no lines"
    one, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    way = draw.choice(("swapped", "twice", "gone", "another file's", "another file's in its place", "all before gone"))
    match way:
        case "swapped":
            lines[one], lines[other] = lines[other], lines[one]
        case "twice":
            lines.insert(other, lines[one])
        case "gone":
            del lines[one]
        case "another file's":
            lines.insert(one, draw.choice(others))
        case "another file's in its place":
            lines[one] = draw.choice(others)
        case _:
            del lines[:one]
    path.write_bytes(b"".join(lines))
    return f"lines {one + 1} and {other + 1}: {way}"


def _of_json(draw: random.Random, path: Path) -> str:
    text = path.read_bytes().decode(errors="replace")
    lines = [text] if path.suffix == ".json" else text.splitlines(keepends=True)
    if not lines:
        return "has no lines"
    number = draw.randrange(len(lines))
    try:
        tree = json.loads(lines[number])
    except (ValueError, RecursionError):
        return "is no JSON"
    holder = [tree]
    how = _mutated(draw, holder)
    with suppress(ValueError):
        lines[number] = json.dumps(holder[0]) + "\n"
    path.write_text("".join(lines), errors="replace")
    return f"line {number + 1}: {how}"


def _mutated(draw: random.Random, holder: list[object]) -> str:
    """Changes something in the tree that is the list's only element."""
    places: list[tuple[list[object] | dict[str, object], object]] = [(holder, 0)]
    for node, key in places:
        inner = node[key]  # type: ignore[index, call-overload]
        if isinstance(inner, dict | list):
            places += [(inner, name) for name in (inner if isinstance(inner, dict) else range(len(inner)))]
    node, key = draw.choice(places[1:] or places)
    way = draw.choice(("value", "value", "another's", "gone", "renamed", "scaled"))
    value = draw.choice(_VALUES)
    other, name = draw.choice(places)
    was = node[key]  # type: ignore[index, call-overload]
    if way == "another's":
        value = json.loads(json.dumps(other[name]))  # type: ignore[index, call-overload]
    elif way == "scaled" and isinstance(was, int | float):
        value = draw.choice((-1, 0, 2, 1000)) * was
    if way in ("gone", "renamed") and node is not holder:
        del node[key]  # type: ignore[arg-type, index, call-overload]
        if way == "renamed" and isinstance(node, dict):
            node[f"{key}x"] = was
        return f"{key!r} {way}"
    node[key] = value  # type: ignore[index, call-overload]
    return f"{key!r} is {str(value)!r:.40}"


def _of_file(draw: random.Random, path: Path) -> str:
    way = draw.choice(("gone", "a folder", "a link to nothing", "empty", "another file"))
    others = [name for name in FILES if (path.parent / name).is_file()]
    content = (path.parent / draw.choice(others)).read_bytes() if others else b""
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    make: dict[str, Callable[[], object]] = {
        "a folder": path.mkdir,
        "a link to nothing": lambda: path.symlink_to("nothing/here"),
        "empty": path.touch,
        "another file": lambda: path.write_bytes(content),
    }
    if way in make:
        make[way]()
    return way


def _numbers(arguments: argparse.Namespace) -> Iterator[int]:
    if arguments.case is not None:
        yield arguments.case
        return
    until, number = time.monotonic() + 60 * arguments.minutes, 0
    while time.monotonic() < until:
        yield number
        number += 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.studies", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--case", type=int, help="only that one; its folder is left there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        with redirect_stderr(StringIO()):
            write_base(base)
        work = Path(tempfile.mkdtemp()) / "work" if arguments.case is not None else Path(folder) / "work"
        seen: Counter[str] = Counter()
        total = 0
        for failure in cases(arguments.seed, _numbers(arguments), base, work):
            total += 1
            if failure is not None:
                seen[failure.error] += 1
                if seen[failure.error] == 1:
                    print(f"case {failure.case}: {'; '.join(failure.done)}\n{failure.error}", flush=True)
    print(f"seed {arguments.seed}: {total} cases, {seen.total()} failed in {len(seen)} ways")
    if arguments.case is not None:
        print(f"it lies in {work}")
    return int(bool(seen))


if __name__ == "__main__":
    sys.exit(main())
