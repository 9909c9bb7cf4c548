"""`python -m orchestrator.sweep`: search the knobs of StreamingLLM for the best speed-quality trade-offs."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from search_spaces import is_matrix
from streamllm.environment import read_env_file
from streamllm.errors import UsageError
from streamllm.results.study_folder import write_rows
from streamllm.terminal.printing import say

from .command_line import matrix_request, parser, resolve

if TYPE_CHECKING:
    from .configuration import SweepConfiguration, WorkerSettings
    from .driver import Driver, Observer
    from .screen.display import Display
    from .search.study import Study
    from .workers.pool import WorkerPool


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    try:
        read_env_file()
        arguments = parser().parse_args(argv)
        if is_matrix(arguments.space):
            from .matrix.run import run_matrix

            return run_matrix(matrix_request(arguments), arguments.dry_run)
        from .workers.lease import study_lease

        configuration = resolve(arguments)
        if arguments.dry_run:
            from .dry_run import describe

            say(describe(configuration))
            return 0
        configuration.output.mkdir(parents=True, exist_ok=True)
        with study_lease(configuration.folder):
            until = started + (configuration.search.time_budget or math.inf)
            return _sweep(configuration, configuration.claim(), until)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _sweep(configuration: SweepConfiguration, study_id: str, until: float) -> int:
    """`until`: when all should be finished, by the monotonic clock."""
    from streamllm.measuring.store import MeasurementStore

    from .conclusion import conclude
    from .screen.display import Display
    from .search.study import Study
    from .tracking.follower import Tracker
    from .tracking.mlflow_runs import Projection
    from .trials_file import TrialsFile

    what, sampler = configuration.identity, configuration.search.sampler
    study = Study(what.study, configuration.journal, what.space, what.cap, what.seed, sampler)
    study.keep(configuration.to_dict(study_id))
    trials = TrialsFile(configuration.folder, study.rows)
    store = MeasurementStore(configuration.store)
    projection = Projection(configuration.to_dict(study_id), store)
    tracker = Tracker(projection, trials)
    display = Display(configuration.trials, study.rows, what.space.objectives, tracker, until=until)
    _introduce(configuration, study, display)
    driver, status, code = _measure(configuration, study, [trials, display, tracker], display, until)
    if found := driver.increases(store.losses):
        write_rows(configuration.folder.increases, found)
    configuration.folder.write_outcome(status)
    conclude(configuration, tracker, display)
    return code


def _measure(
    configuration: SweepConfiguration,
    study: Study,
    observers: list[Observer],
    display: Display,
    until: float,
) -> tuple[Driver, str, int]:
    """Searches and confirms. Returns the driver, how the sweep ended, and its exit code."""
    from .driver import Driver
    from .workers.messages import WorkerSetup
    from .workers.pool import SweepError, WorkerPool

    what, search, rounds = configuration.identity, configuration.search, configuration.confirm.rounds
    setup = WorkerSetup(
        model=what.model,
        source=what.source,
        dtype=what.dtype,
        quantization=what.quantization,
        store=configuration.store.absolute(),
        total=what.cap,
        directory=Path.cwd(),
        model_digest=what.model_digest,
        text_file_digest=what.text_file_digest,
    )
    with display:
        display.note("starting Ray and its workers")
        pool = WorkerPool(setup, _with_the_cores_of(study, configuration.workers), note=display.note)
        driver = Driver(
            study,
            pool,
            what.cap,
            configuration.trials,
            observers,
            display.note,
            until=until,
            confirm=rounds,
            baseline_tokens=search.baseline_tokens,
        )
        try:
            with _interruptible(pool):
                driver.run()
                if rounds:
                    _confirm(configuration, driver, display, until)
        except SweepError as error:
            display.note(f"error: {error}")
            return driver, "FAILED", 1
        except KeyboardInterrupt:
            display.note("interrupted: the same command goes on from here")
            return driver, "KILLED", 130
        finally:
            pool.shutdown()
    return driver, "FINISHED", 0


def _with_the_cores_of(study: Study, workers: WorkerSettings) -> WorkerSettings:
    """The same number for each as when the study began: times of one and of two threads do not compare. Raises
    UsageError."""
    if workers.cpus and study.threads and workers.cpus != study.threads:
        raise UsageError(
            f"cpus per worker {workers.cpus}: study {study.name!r} was timed with {study.threads} per worker; "
            f"leave it out, or give another --study"
        )
    return replace(workers, cpus=workers.cpus or study.threads)


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


def _confirm(configuration: SweepConfiguration, driver: Driver, display: Display, until: float) -> None:
    """Times the front's candidates again and writes `confirmed.jsonl`. What then still looks better than the front
    without having been confirmed is confirmed too."""
    from streamllm.measuring.store import MeasurementStore
    from streamllm.results.study import load_study

    from .search.confirm import candidates, comparable, confirmed_rows, unconfirmed_better
    from .search.rounds import read_rounds, take_rounds

    folder, store, rounds = configuration.folder, MeasurementStore(configuration.store), configuration.confirm.rounds
    results = load_study(str(folder.path))
    earlier = {trial for one in read_rounds(folder) for trial in one.members}
    can_be = partial(comparable, losses_of=lambda row: store.losses(row["quality_entry"]), note=display.note)
    chosen = added = can_be(candidates(results.trials, results.objectives, earlier))
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
        write_rows(configuration.folder.confirmed, values)
        results = load_study(str(folder.path))
        better = unconfirmed_better(results.trials, results.objectives)
        added = can_be([row for row in better if str(row["trial"]) not in failed])
        if added:
            numbers = ", ".join(str(row["trial"]) for row in added)
            display.note(f"confirmed too, as nothing confirmed is better: trial {numbers}")
            chosen = [*chosen, *added]


def _introduce(configuration: SweepConfiguration, study: Study, display: Display) -> None:
    what = configuration.identity
    display.note(f"study {what.study}: {configuration.summary}")
    if what.cap < what.space.cap:
        display.note(f"total KV is capped at {what.cap} here; the space says {what.space.cap}")
    if study.rows:
        display.note(f"going on: {len(study.rows)} of {configuration.trials} trials are finished")


if __name__ == "__main__":
    sys.exit(main())
