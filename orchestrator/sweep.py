"""`python -m orchestrator.sweep`: search the knobs of StreamingLLM for the best speed-quality trade-offs."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from search_spaces import is_matrix
from streamllm.environment import read_env_file
from streamllm.errors import UsageError
from streamllm.files import remove_torn, write_atomically
from streamllm.results.study_folder import StudyFolder, write_rows
from streamllm.terminal.printing import say
from streamllm.terminal.program import command

from .command_line import matrix_request, parser, resolve
from .copies import kept
from .ending import WORDS, Ending
from .output import Output, warn_of_tracking

if TYPE_CHECKING:
    from streamllm.results.schema import Row

    from .configuration import SweepConfiguration, WorkerSettings
    from .driver import Driver, Observer
    from .screen.display import Display
    from .search.study import Study
    from .workers.messages import WorkerSetup


@command
def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    with Ending() as ending:
        try:
            return _run(argv, started, ending)
        except KeyboardInterrupt:
            ending.was_heard()
            ending.say()
            return ending.exit_code


def _run(argv: Sequence[str] | None, started: float, ending: Ending) -> int:
    read_env_file()
    arguments = parser().parse_args(argv)
    if is_matrix(arguments.space):
        from .matrix.run import run_matrix

        return run_matrix(matrix_request(arguments), arguments.dry_run, ending, arguments.tracking_uri)
    from .workers.importing import lasting_imports
    from .workers.lease import study_lease

    with lasting_imports():  # torch and transformers, by which the model's files are checked
        configuration = resolve(arguments)
    if arguments.dry_run:
        from .dry_run import describe

        say(describe(configuration))
        return 0
    configuration.output.mkdir(parents=True, exist_ok=True)
    with study_lease(configuration.folder):
        for path in (configuration.output, configuration.store):
            remove_torn(path)
        until = started + (configuration.search.time_budget or math.inf)
        warn_of_tracking(arguments.tracking_uri)
        copy = Output.of(arguments.output).copy
        return _sweep(configuration, configuration.claim(), until, ending, arguments.tracking_uri, copy)


def _sweep(
    configuration: SweepConfiguration,
    study_id: str,
    until: float,
    ending: Ending,
    tracking_uri: str | None,
    copy: str | None,
) -> int:
    """`until`: when all should be finished, by the monotonic clock; `tracking_uri`: of MLflow; `copy`: a URL."""
    from .conclusion import conclude
    from .screen.display import Display
    from .search.study import Study
    from .tracking.follower import Tracker
    from .tracking.mlflow_runs import Projection
    from .trials_file import TrialsFile
    from .workers.cluster import quiet_stdout

    what, sampler, folder = configuration.identity, configuration.search.sampler, configuration.folder
    study = Study(what.study, configuration.journal, what.space, what.cap, what.seed, sampler)
    study.keep(configuration.to_dict(study_id))
    trials = TrialsFile(folder, study.rows)
    projection = Projection(configuration.folder, configuration.to_dict(study_id), tracking_uri)
    tracker = Tracker(projection, trials)
    display = Display(configuration.trials, study.rows, what.space.objectives, tracker, until=until)
    _introduce(configuration, study, display)
    observers: list[Observer] = [trials, display, tracker]
    with kept(copy, folder, display.note):
        with display, quiet_stdout():
            measured = _measure(configuration, study, observers, display, until, ending)
        if not measured.is_written:
            return measured.code
        if measured.found:
            write_rows(folder.increases, measured.found)
        conclude(configuration, tracker, display, ending, tracking_uri)
        return measured.code


@dataclass(frozen=True, slots=True)
class _Measured:
    """How a sweep's measuring ended."""

    code: int
    """The exit code."""
    is_written: bool
    """False where the study's folder takes nothing more."""
    found: Sequence[Row] = ()
    """What trials cost beside the baseline, as well as it is known by now."""


def _measure(
    configuration: SweepConfiguration,
    study: Study,
    observers: list[Observer],
    display: Display,
    until: float,
    ending: Ending,
) -> _Measured:
    """Searches and confirms, and writes how that ended."""
    from streamllm.measuring.plans import more_for
    from streamllm.measuring.store import MeasurementStore

    from .confirming import confirm
    from .driver import Driver
    from .scheduler import Scheduler
    from .timing import Timing
    from .unwritable import UnwritableError, writing
    from .workers.kinds import Kinds
    from .workers.messages import SweepError
    from .workers.pool import WorkerPool

    what, search, rounds = configuration.identity, configuration.search, configuration.confirm.rounds
    store = MeasurementStore(configuration.store)
    pool = driver = None
    status: str | None = "FAILED"
    code = 1
    try:
        text = what.tokens()
        display.note("starting Ray and its workers")
        setup = _worker_setup(configuration)
        pool = WorkerPool(setup, _with_the_cores_of(study, configuration.workers), note=display.note)
        kinds = Kinds(study.rows, display.note, "energy" in more_for(what.space.measures))
        turns = Timing(configuration.workers.timing, configuration.folder, display.note)
        scheduler = Scheduler(pool, store, setup.variant, display.note, [display], kinds.check, turns)
        driver = Driver(
            study,
            scheduler,
            text,
            setup.variant,
            configuration.trials,
            observers,
            display.note,
            until=until,
            confirm=rounds,
            baseline_tokens=search.baseline_tokens,
            tasks=what.tasks,
            complete_to=search.until,
        )
        driver.run()
        with writing():
            _keep_what_is_left(configuration.folder, driver)
        while rounds:
            with writing():
                confirm(configuration, driver, kinds, display, until)
                _keep_what_is_left(configuration.folder, driver)
            display.searching_on()
            if not driver.goes_on():
                break
        status, code = "FINISHED", 0
    except UnwritableError as error:
        display.note(f"error: {error}")
        status = None
    except (SweepError, UsageError, KeyboardInterrupt) as error:
        if ending.is_why(error):
            display.note(WORDS)
            status, code = "KILLED", ending.exit_code
        else:
            display.note(f"error: {error}")
            code = 2 if isinstance(error, UsageError) else 1
    finally:
        is_written = status is not None and _takes(configuration.folder, status, display.note)
        if pool is not None:
            pool.shutdown()
    found = driver.increases(store.losses) if driver is not None else ()
    return _Measured(code if is_written else code or 1, is_written, found)


def _keep_what_is_left(folder: StudyFolder, driver: Driver) -> None:
    """What is left to find, and what decides it, where the sampler knows: adds to `sweep.json` how much, and writes
    `expected.jsonl`."""
    if (found := driver.completeness()) is not None:
        known = {"completeness": found, "effects": driver.study.effects()}
        folder.write_configuration({**folder.read_configuration(), **known})
    if rows := driver.study.expectations():
        write_atomically(folder.expected, "".join(json.dumps(row) + "\n" for row in rows))


def _takes(folder: StudyFolder, status: str, note: Callable[[str], None]) -> bool:
    """Whether the folder could be told how the sweep ended."""
    from .unwritable import UnwritableError, writing

    try:
        with writing():
            folder.write_outcome(status)
    except UnwritableError as error:
        note(f"error: {error}")
        return False
    return True


def _worker_setup(configuration: SweepConfiguration) -> WorkerSetup:
    from .workers.messages import Variant, WorkerSetup
    from .workers.pool import settings_for_workers

    what = configuration.identity
    return WorkerSetup(
        model=what.model,
        variant=Variant(what.dtype, what.quantization),
        directory=Path.cwd(),
        model_digest=what.model_digest,
        environment=settings_for_workers(),
    )


def _with_the_cores_of(study: Study, workers: WorkerSettings) -> WorkerSettings:
    """The same number for each as when the study began: times of one and of two threads do not compare. Raises
    UsageError."""
    if workers.cpus and study.threads and workers.cpus != study.threads:
        raise UsageError(
            f"cpus per worker {workers.cpus}: study {study.name!r} was timed with {study.threads} per worker; "
            f"leave it out, or give another --study"
        )
    return replace(workers, cpus=workers.cpus or study.threads)


def _introduce(configuration: SweepConfiguration, study: Study, display: Display) -> None:
    what = configuration.identity
    display.note(f"study {what.study}: {configuration.summary}")
    if what.cap < what.space.cap:
        display.note(f"total KV is capped at {what.cap} here; the space says {what.space.cap}")
    if study.rows:
        display.note(f"going on: {len(study.rows)} of {configuration.trials} trials are finished")


if __name__ == "__main__":
    sys.exit(main())
