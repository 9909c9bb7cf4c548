"""A study as a sweep leaves it, by the code that writes its files, with made measurements; and how the same command
goes on from it, until there is something to measure."""

import json
from dataclasses import asdict
from pathlib import Path

from orchestrator.conclusion import keep_front
from orchestrator.configuration import Identity, SweepConfiguration
from orchestrator.search.rounds import Round
from orchestrator.search.rows import failed_row
from orchestrator.search.study import Study
from orchestrator.trials_file import TrialsFile
from orchestrator.workers.lease import study_lease
from search_spaces import SearchSpace
from streamllm.configuration import Configuration
from streamllm.measuring.text import TextSource
from streamllm.policy import strict_policy
from streamllm.results.constraint import Constraint
from streamllm.results.schema import Row
from streamllm.results.study import load_study
from streamllm.results.study_folder import append_line, append_row, write_rows

from .made_studies import row

TRIALS = 7
_WORKER = {"device": "a CPU", "threads": 1, "software": "torch 2"}
_CLOCK = {"measured_tpot_ms": 9.0, "reference_tpot_ms": 8.0, "pairs": 12, "timed_at": 1.7e9, "load": 0.5, **_WORKER}
_OF_ALL = {
    **_CLOCK, "n_tokens": 300, "model_digest": "da7a", "text_digest": "7e47", "commit": "c0ffee", "finished_at": 1.7e9,
    "evaluated_tokens": 299, "sampled_tokens": 64, "quality_entry": "ab" * 32, "speed_entry": "cd" * 32,
    "reference_total": 48, "quality_sec": 1.0, "speed_sec": 1.0,
}  # fmt: skip
_SPACE = SearchSpace(
    name="made",
    description="",
    cap=48,
    cap_accounting="nominal",
    objectives=("tpot_ms", "ppl_increase_percent"),
    parameters={
        "method": ("ours", "window"),
        "attn_backend": ("math", "flash"),
        "execution": ("eager",),
        "total_kv": (24, 48),
        "n_sink": (0, 4),
        "compress_every": (1, 16),
        "cache_slack": (0,),
        "max_drop": (0, 8),
    },
    known=(),
    when={"n_sink": {"method": ("ours",)}},
    defaults={"n_sink": 4},
    constraints=(Constraint("ppl_increase_percent", "<=", 6.0),),
)


def configuration_in(folder: Path, study: str = "s") -> SweepConfiguration:
    source = TextSource(text=Path("text.txt"))
    identity = Identity(
        study=study, model="m", source=source, dtype="float32", quantization="none", space=_SPACE, cap=48, seed=1
    )
    return SweepConfiguration(output=folder / "sweeps" / study, identity=identity)


def write_finished(folder: Path, study: str = "s") -> SweepConfiguration:
    """Under `sweeps/`; its last trial has failed. Two were confirmed in two rounds, and one was running at the end."""
    configuration = configuration_in(folder, study)
    configuration.output.mkdir(parents=True)
    opened, trials = go_on(configuration)
    for name, method, ratio in (("strict", "ring", 1.0), ("baseline", "recompute", 20.0)):
        trials.trial_finished(_made(name, Configuration(method, strict_policy(48)), ratio, 0.0))
    for number in range(TRIALS):
        trial = opened.ask()
        assert trial is not None and trial.number == number
        made = _made(number, trial.configuration, 1.5 + 0.5 * number, 5.0 - number)
        if number == TRIALS - 1:
            made = failed_row(trial, "MemoryError: no room")
        trials.trial_finished(opened.tell(number, made))
    opened.ask()
    files = configuration.folder
    write_rows(files.increases, [Row.of({"trial": n, "ppl_increase_percent": 4.5 - n}) for n in range(TRIALS - 1)])
    for line in (1, 2):
        ratios = {"baseline": [20.0, 20.5], "0": [1.5, 1.6], "2": [2.5, 2.4]}
        one = Round(ratios, dict.fromkeys(ratios, _CLOCK), {}, "c0de", line)
        append_line(files.rounds, json.dumps(asdict(one)))
    for trial, ratio in (("baseline", 20.2), (0, 1.55), (2, 2.45)):
        again = {"trial": trial, "rounds": 2, "round_lines": [1, 2], **_CLOCK, "time_ratio": ratio}
        sure = {"front_probability": 0.75, "not_told_from": [], "time_ratio_low": 1.4, "time_ratio_high": 2.6}
        append_row(files.confirmed, Row.of(again | (sure if trial != "baseline" else {})))
    files.write_outcome("FINISHED")
    keep_front(load_study(str(configuration.output)))
    return configuration


def go_on(configuration: SweepConfiguration) -> tuple[Study, TrialsFile]:
    """What the command does before it starts its workers."""
    what = configuration.identity
    with study_lease(configuration.folder):
        study_id = configuration.claim()
        study = Study(what.study, configuration.journal, what.space, what.cap, what.seed)
        study.keep(configuration.to_dict(study_id))
        return study, TrialsFile(configuration.folder, study.rows)


def _made(trial: int | str, what: Configuration, ratio: float, increase: float) -> Row:
    policy = asdict(what.effective)
    interval = {"time_ratio": ratio, "time_ratio_low": 0.9 * ratio, "time_ratio_high": 1.1 * ratio}
    how = {"method": what.method, "backend_requested": what.backend, "backend": "flash", "execution": what.execution}
    no_unit = dict.fromkeys(("tpot_ms", "tpot_ms_low", "tpot_ms_high"))  # which is known at the end
    return Row.of(row(trial, 8.0 * ratio, increase, **_OF_ALL) | no_unit | policy | interval | how)
