"""`python -m orchestrator.sweep`: search the knobs of StreamingLLM for the best speed-quality trade-offs."""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from search_spaces import SHIPPED, is_matrix, load_space
from streamllm.arguments import add_model_arguments, add_sample_argument, add_text_arguments, sample_size, text_source
from streamllm.environment import HELP, read_env_file
from streamllm.errors import UsageError
from streamllm.printing import say

from .options import SAMPLERS

if TYPE_CHECKING:
    from search_spaces import SearchSpace

    from .configuration import SweepConfiguration
    from .display import Display
    from .driver import Driver, Observer
    from .pool import WorkerPool
    from .study import Study
    from .tracker import Tracker

_EXAMPLES = """examples:
  python -m orchestrator.sweep                                  the embedded model and text: minutes, no GPU, no network
  python -m orchestrator.sweep --trials 100                     go on with the same study
  python -m orchestrator.sweep --model EleutherAI/pythia-2.8b --dataset-name pg19 --max-eval-tokens 20000 --study pythia
  python -m orchestrator.sweep --space comprehensive            a matrix: every cell measured once; --dry-run lists them
  python -m orchestrator.sweep --model ./my-model --text book.txt --space my_space.yaml --study mine

Interrupt it as you like: the same command goes on where it was, nothing finished is measured again.

"""


_OF_SEARCHES = (
    "trials",
    "time_budget",
    "sampler",
    "workers",
    "trial_timeout",
    "load_timeout",
    "confirm",
    "baseline_tokens",
    "seed",
    "address",
)
"""Options that mean nothing to a matrix."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.sweep",
        description="Search the knobs of StreamingLLM for the best trade-offs of speed and perplexity on this machine.",
        epilog=_EXAMPLES + HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is swept")
    add_model_arguments(what)
    add_text_arguments(what)
    what.add_argument(
        "--space", default="default", metavar="SPACE", help=f"{', '.join(SHIPPED)}, or a YAML file (default)"
    )
    what.add_argument("--cap", type=int, metavar="N", help="total KV, in tokens (the space's, or the trained length)")

    how = parser.add_argument_group("how")
    how.add_argument(
        "--trials", type=int, metavar="N", help="configurations to measure in all (16; what fits in a time budget)"
    )
    how.add_argument(
        "--time-budget",
        metavar="TIME",
        help="be finished, loading and confirming included, after about 10m, 90m or 2h (no limit)",
    )
    how.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default="auto",
        help="what suggests configurations; may change when a study goes on (auto: by how many trials there are)",
    )
    how.add_argument(
        "--workers", type=int, default=0, metavar="N", help="actors (one per GPU; without any, one per core)"
    )
    how.add_argument(
        "--cpus-per-worker", type=int, default=0, metavar="N", help="cores each worker owns (1, or an equal share)"
    )
    how.add_argument(
        "--trial-timeout",
        type=float,
        metavar="SEC",
        help="a worker that is longer at a trial is ended (an hour, or ten times the slowest trial so far)",
    )
    how.add_argument(
        "--load-timeout", type=float, default=1800.0, metavar="SEC", help="so is one that loads for longer (1800)"
    )
    how.add_argument(
        "--confirm",
        type=int,
        default=3,
        metavar="N",
        help="rounds in which the front's times are taken again (3; 0: none)",
    )
    add_sample_argument(how, "a quarter of the time")
    how.add_argument(
        "--max-ppl-increase",
        metavar="PERCENT",
        help="recommend the fastest whose perplexity is at most so much above re-computation's (the front's knee)",
    )
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of the search (0)")
    how.add_argument("--address", metavar="ADDRESS", help="join a Ray cluster, for example 'auto' (start one here)")

    how.add_argument(
        "--dry-run", action="store_true", help="print what would be done and its expected cost; start nothing"
    )

    where = parser.add_argument_group("where")
    where.add_argument("--study", metavar="NAME", help="name of the study (MODEL-TEXT-SPACE)")
    where.add_argument("--output", type=Path, metavar="DIR", help="folder of the results (sweeps/STUDY)")
    return parser


def check_matrix_options(arguments: argparse.Namespace) -> None:
    """Raises UsageError for an option that a matrix, which searches nothing, cannot heed."""
    usual = parser().parse_args([])
    given = [name for name in _OF_SEARCHES if getattr(arguments, name) != getattr(usual, name)]
    if given:
        raise UsageError(
            f"{', '.join('--' + name.replace('_', '-') for name in given)}: of searches; the matrix "
            f"{arguments.space!r} measures each of its cells once, in this process; leave it out"
        )


def resolve(arguments: argparse.Namespace) -> SweepConfiguration:
    """Checks all that can be checked before anything is started. Raises UsageError."""
    from dashboards.recommendation import percent

    source = text_source(arguments)
    space = load_space(arguments.space)
    for name, least in (("trials", 1), ("workers", 0), ("cpus_per_worker", 0), ("seed", 0), ("confirm", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UsageError(f"{name} {value}: must be a whole number >= {least}")
    for name in ("trial_timeout", "load_timeout"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UsageError(f"{name} {value}: must be seconds > 0")
    time_budget = None if arguments.time_budget is None else seconds(arguments.time_budget)
    limit = None if arguments.max_ppl_increase is None else percent(arguments.max_ppl_increase)
    label = Path(arguments.model).name or arguments.model
    of_cap = f"-{arguments.cap}" if arguments.cap is not None else ""
    study = arguments.study or f"{label}-{source.label}-{space.name}{of_cap}"
    if not re.fullmatch(r"[\w.][\w.+-]*", study):
        raise UsageError(f"study {study!r}: use letters, digits, '.', '_', '+' and '-' only")

    from streamllm.methods import check_protocol
    from streamllm.models import trained_length, weights_digest
    from streamllm.text import file_digest

    from .configuration import SweepConfiguration, total_kv
    from .study import check_cap

    for method in space.parameters.get("method", ()):
        check_protocol(str(method), "fast")
    _check_quantizations(space, arguments.quantization)
    cap = total_kv(arguments.cap, space.cap, trained_length(arguments.model))
    space = space.under(cap)
    check_cap(space, cap)
    configuration = SweepConfiguration(
        study=study,
        output=arguments.output or Path("sweeps") / study,
        model=arguments.model,
        source=source,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        space=space,
        cap=cap,
        trials=arguments.trials or (16 if time_budget is None else space.size),
        workers=arguments.workers,
        seed=arguments.seed,
        sampler=arguments.sampler,
        time_budget=time_budget,
        baseline_tokens=sample_size(arguments.baseline_tokens),
        max_ppl_increase=limit,
        model_digest=weights_digest(arguments.model),
        text_file_digest=file_digest(source),
    )
    on_cuda = load_space(arguments.space, {"cuda"}).under(cap)
    if on_cuda == space or configuration.goes_on() or not _has_cuda(arguments):  # a study keeps the space it began with
        return configuration
    trials = arguments.trials or (16 if time_budget is None else on_cuda.size)
    return replace(configuration, space=on_cuda, trials=trials)


def _check_quantizations(space: SearchSpace, given: str) -> None:
    """Raises UsageError for one beside those that the space has, or without the library that makes them."""
    wanted = space.parameters.get("quantization")
    if wanted is None:
        return
    if given != "none":
        own = ", ".join(map(str, wanted))
        raise UsageError(f"quantization {given!r}: the space {space.name!r} has its own ({own}); leave it out")
    if set(wanted) != {"none"} and find_spec("torchao") is None:
        raise UsageError(f"quantization {str(wanted[-1])!r}: needs torchao; pip install -e '.[quant]'")


def _has_cuda(arguments: argparse.Namespace) -> bool:
    """Whether workers will be on CUDA devices; a dry run does not join a cluster to ask, and takes it for granted."""
    from .device_kinds import device_kinds

    joins = arguments.address is not None or bool(os.environ.get("RAY_ADDRESS"))
    return (arguments.dry_run and joins) or "cuda" in device_kinds(arguments.address)


def seconds(text: str) -> float:
    """Of a time such as 90s, 30m, 2h or 1h30m. Raises UsageError."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text)
    total = sum(int(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    if total == 0:
        raise UsageError(f"time budget {text!r}: must be a time such as 90s, 30m, 2h or 1h30m")
    return float(total)


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    try:
        read_env_file()
        arguments = parser().parse_args(argv)
        if is_matrix(arguments.space):
            from .matrix import run_matrix

            check_matrix_options(arguments)
            return run_matrix(arguments)
        from .lease import study_lease

        configuration = resolve(arguments)
        if arguments.dry_run:
            from .dry_run import describe

            say(describe(configuration, arguments.address, arguments.cpus_per_worker, arguments.confirm))
            return 0
        configuration.output.mkdir(parents=True, exist_ok=True)
        with study_lease(configuration.output):
            until = started + (configuration.time_budget or math.inf)
            return _sweep(configuration, configuration.claim(), arguments, until)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _sweep(configuration: SweepConfiguration, study_id: str, arguments: argparse.Namespace, until: float) -> int:
    """`until`: when all should be finished, by the monotonic clock."""
    from streamllm.store import MeasurementStore

    from .display import Display
    from .folder import TrialsFile, write_outcome, write_rows
    from .study import Study
    from .tracker import Tracker
    from .tracking import Projection

    study = Study(
        configuration.study,
        configuration.journal,
        configuration.space,
        configuration.cap,
        configuration.seed,
        configuration.sampler,
    )
    trials = TrialsFile(configuration.output, study.rows)
    store = MeasurementStore(configuration.store)
    projection = Projection(configuration.to_dict(study_id), store)
    tracker = Tracker(projection, trials)
    display = Display(configuration.trials, study.rows, configuration.space.objectives, tracker, until=until)
    _introduce(configuration, study, display)
    driver, status, code = _measure(configuration, arguments, study, [trials, display, tracker], display, until)
    if found := driver.increases(store.losses):
        write_rows(configuration.output / "increases.jsonl", found)
    write_outcome(configuration.output, status)
    _conclude(configuration, tracker, display)
    return code


def _measure(
    configuration: SweepConfiguration,
    arguments: argparse.Namespace,
    study: Study,
    observers: list[Observer],
    display: Display,
    until: float,
) -> tuple[Driver, str, int]:
    """Searches and confirms. Returns the driver, how the sweep ended, and its exit code."""
    from .driver import Driver
    from .pool import SweepError, WorkerPool
    from .trial import WorkerSetup

    setup = WorkerSetup(
        model=configuration.model,
        source=configuration.source,
        dtype=configuration.dtype,
        quantization=configuration.quantization,
        store=configuration.store.absolute(),
        total=configuration.cap,
        directory=Path.cwd(),
        model_digest=configuration.model_digest,
        text_file_digest=configuration.text_file_digest,
    )
    with display:
        display.note("starting Ray and its workers")
        pool = WorkerPool(
            setup,
            configuration.workers,
            arguments.address,
            cpus_per_worker=_cores_per_worker(arguments.cpus_per_worker, study),
            trial_timeout=arguments.trial_timeout,
            load_timeout=arguments.load_timeout,
            note=display.note,
        )
        limits = (until, arguments.confirm, configuration.baseline_tokens)
        driver = Driver(study, pool, configuration.cap, configuration.trials, observers, display.note, *limits)
        try:
            with _interruptible(pool):
                driver.run()
                if arguments.confirm:
                    _confirm(configuration, driver, display, arguments.confirm, until)
        except SweepError as error:
            display.note(f"error: {error}")
            return driver, "FAILED", 1
        except KeyboardInterrupt:
            display.note("interrupted: the same command goes on from here")
            return driver, "KILLED", 130
        finally:
            pool.shutdown()
    return driver, "FINISHED", 0


def _cores_per_worker(wanted: int, study: Study) -> int:
    """As many as when the study began: times of one and of two threads do not compare. Raises UsageError."""
    if wanted and study.threads and wanted != study.threads:
        raise UsageError(
            f"cpus per worker {wanted}: the times of study {study.name!r} are of {study.threads} a worker; "
            f"leave it out, or give another --study"
        )
    return wanted or study.threads


@contextmanager
def _interruptible(pool: WorkerPool) -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt at once and, where that is lost in a library's callback, when the pool is next
    waited for."""

    def interrupt(*_: object) -> None:
        pool.interrupted = True
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone is sent signals
        yield
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _confirm(configuration: SweepConfiguration, driver: Driver, display: Display, rounds: int, until: float) -> None:
    """Times the front's candidates again and writes `confirmed.jsonl`. What then still looks better than the front
    without having been confirmed is confirmed too."""
    from dashboards.study import load_study
    from streamllm.store import MeasurementStore

    from .confirm import candidates, confirmed_rows, unconfirmed_better
    from .folder import write_rows
    from .rounds import read_rounds, take_rounds

    folder, store = configuration.output, MeasurementStore(configuration.store)
    results = load_study(str(folder))
    earlier = {trial for one in read_rounds(folder) for trial in one.members}
    chosen = added = candidates(results.trials, results.objectives, earlier)
    while added and results.baseline is not None and driver.comparison is not None:
        display.confirming(len(chosen) + 1, rounds)
        fixed = results.baseline
        workers, kind = driver.confirming
        members = [fixed, *chosen]
        taken = take_rounds(folder, driver.pool, workers, members, rounds, display.trial_started, until, kind)
        failed = {trial: reason for one in taken for trial, reason in one.failed.items()}
        for trial, reason in failed.items():
            display.note(f"warning: trial {trial} cannot be confirmed: {reason}")
        if str(fixed["trial"]) in failed:
            return
        rows = sorted((row for row in chosen if str(row["trial"]) not in failed), key=lambda row: int(row["trial"]))
        values = confirmed_rows(
            taken,
            rows,
            fixed,
            driver.comparison,
            lambda row: store.losses(row["quality_entry"]),
            results.objectives,
        )
        write_rows(folder / "confirmed.jsonl", values)
        results = load_study(str(folder))
        added = [
            row for row in unconfirmed_better(results.trials, results.objectives) if str(row["trial"]) not in failed
        ]
        if added:
            numbers = ", ".join(str(row["trial"]) for row in added)
            display.note(f"confirmed too, as nothing confirmed is better: trial {numbers}")
            chosen = [*chosen, *added]


def _introduce(configuration: SweepConfiguration, study: Study, display: Display) -> None:
    display.note(f"study {configuration.study}: {configuration.summary}")
    if configuration.cap < configuration.space.cap:
        display.note(f"total KV is capped at {configuration.cap} here; the space says {configuration.space.cap}")
    if study.rows:
        display.note(f"going on: {len(study.rows)} of {configuration.trials} trials are finished")


def _conclude(configuration: SweepConfiguration, tracker: Tracker, display: Display) -> None:
    """Tables, figures, the recommendation, MLflow, and what to type next."""
    from dashboards.pareto import print_table
    from dashboards.study import load_study

    from .folder import keep_front, keep_recommendation, write_report
    from .tracking import one_line

    results = load_study(str(configuration.output))
    report = [configuration.output / "sweep.json"]
    if results.trials:
        keep_recommendation(results)
        for reason in keep_front(results):
            display.note(reason)
        print_table(results)
        try:
            report += write_report(results)
        except Exception as error:  # the results are complete without it
            display.note(
                f"warning: the report could not be written ({one_line(error)}); "
                f"{_python()} -m dashboards.report {configuration.output} tries again"
            )
    try:
        problem = tracker.finish(report, display.draining)
    except KeyboardInterrupt:
        problem = "interrupted"
    if problem is not None:
        display.note(
            f"warning: MLflow does not have everything yet ({problem}); the results are complete in "
            f"{configuration.output}, and this brings it up to date: "
            f"{_python()} -m orchestrator.sync {configuration.output}"
        )
    if results.trials:
        say(_next_steps(configuration))


def _next_steps(configuration: SweepConfiguration) -> str:
    python = _python()
    more = f" with --trials {2 * configuration.trials}" if configuration.time_budget is None else ""
    return "\n".join(
        (
            f"report    {configuration.output}/report.html; tables and figures beside it",
            f"browse    {python} -m dashboards.serve",
            f"export    {python} -m dashboards.pareto {configuration.output} --format latex,parquet --all",
            f"go on     the same command{more}",
            f"bigger    {python} -m orchestrator.sweep --model EleutherAI/pythia-2.8b --dataset-name pg19 "
            f"--max-eval-tokens 20000",
        )
    )


def _python() -> str:
    """How to type the interpreter that runs this."""
    executable = Path(sys.executable)
    if shutil.which("python") == str(executable):
        return "python"
    return str(executable.relative_to(Path.cwd()) if executable.is_relative_to(Path.cwd()) else executable)


if __name__ == "__main__":
    sys.exit(main())
