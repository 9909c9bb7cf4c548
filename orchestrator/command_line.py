"""The sweep's command line: its options, and the configuration they mean, checked before anything is started."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from search_spaces import SHIPPED, load_space
from streamllm.environment import HELP
from streamllm.errors import UsageError, shown
from streamllm.results.study_folder import StudyFolder
from streamllm.terminal.arguments import (
    add_model_arguments,
    add_sample_argument,
    add_text_arguments,
    check_values,
    percent,
    sample_size,
    text_source,
)
from streamllm.terminal.parser import CommandParser
from streamllm.terminal.program import program
from streamllm.version import __version__

from .copies import bring_back
from .options import SAMPLERS, TIMINGS
from .output import Output
from .study_name import model_label, study_name

if TYPE_CHECKING:
    from search_spaces import SearchSpace
    from streamllm.measuring.text import TextSource

    from .configuration import Identity, SweepConfiguration, WorkerSettings
    from .matrix.plan import MatrixRequest

_EXAMPLES = """examples:
  python -m orchestrator.sweep                                  the embedded model and text: minutes, no GPU, no network
  python -m orchestrator.sweep --trials 100                     go on with the same study
  python -m orchestrator.sweep --model EleutherAI/pythia-2.8b --dataset-name pg19 --max-eval-tokens 20000 --study pythia
  python -m orchestrator.sweep --space comprehensive            a matrix: every cell measured once; --dry-run lists them
  python -m orchestrator.sweep --model ./my-model --text book.txt --space my_space.yaml --study mine

Interrupt it as you like: the same command goes on where it was, nothing finished is measured again.

"""


_ROUNDS = 3
"""Of confirming a search."""
_OF_SEARCHES = (
    "trials",
    "until",
    "time_budget",
    "sampler",
    "baseline_tokens",
    "seed",
    "max_ppl_increase",
)
"""Options that mean nothing to a matrix."""


def parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=program("orchestrator.sweep"),
        description="Search the knobs of StreamingLLM for the best trade-offs of speed and perplexity on this machine.",
        epilog=_EXAMPLES + HELP,
    )
    parser.add_argument("--version", action="version", version=f"streamllm-sweep {__version__}")
    what = parser.add_argument_group("what is swept")
    add_model_arguments(what)
    add_text_arguments(what)
    what.add_argument(
        "--space", default="default", metavar="SPACE", help=f"{', '.join(SHIPPED)}, or a YAML file (default)"
    )
    what.add_argument(
        "--backends", metavar="LIST", help="attention kernels instead of the space's, such as math,flash: times each"
    )
    what.add_argument("--cap", type=int, metavar="N", help="total KV, in tokens (the space's, or the trained length)")

    how = parser.add_argument_group("how")
    how.add_argument(
        "--trials", type=int, metavar="N", help="configurations to measure in all (16; what fits in a time budget)"
    )
    how.add_argument(
        "--until",
        type=float,
        metavar="SHARE",
        help="stop when timing all the rest would add that share to the front's hypervolume, such as 0.01, with a "
        "probability below 5%% (never; --trials and --time-budget still hold)",
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
        help="what suggests configurations; may change when a study goes on (auto: front, after 150 trials nsga2 "
        "where --until is not given)",
    )
    how.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="actors (0, one per GPU; without any, one per core)",
    )
    how.add_argument(
        "--cpus-per-worker", type=int, default=0, metavar="N", help="cores each worker owns (0: one, or an equal share)"
    )
    how.add_argument(
        "--trial-timeout",
        type=float,
        metavar="SEC",
        help="a worker that takes longer for a trial is ended (an hour, or ten times the slowest trial so far)",
    )
    how.add_argument(
        "--load-timeout",
        type=float,
        default=1800.0,
        metavar="SEC",
        help="one that loads for longer is ended too (1800)",
    )
    how.add_argument(
        "--timing",
        choices=TIMINGS,
        default="auto",
        help="time GPUs of one node one at a time or side by side (auto: as they are found to disturb one another)",
    )
    how.add_argument(
        "--confirm",
        type=int,
        metavar="N",
        help="rounds at most that take the front's times again (3; 0: none), or those of a matrix' cells (none)",
    )
    add_sample_argument(how, "a quarter of the time")
    how.add_argument(
        "--max-ppl-increase",
        metavar="PERCENT",
        help="recommend the fastest whose perplexity is at most so much above re-computation's (the front's knee)",
    )
    how.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the search (0)")
    how.add_argument("--address", metavar="ADDRESS", help="join a Ray cluster, for example 'auto' (start one here)")

    how.add_argument(
        "--dry-run", action="store_true", help="print what would be done and its expected cost; start nothing"
    )

    where = parser.add_argument_group("where")
    where.add_argument("--study", metavar="NAME", help="name of the study (MODEL-TEXT-SPACE)")
    where.add_argument(
        "--output",
        metavar="DIR|URL",
        help="folder of the results (sweeps/STUDY); s3://..., gs://...: that folder, and a copy there as it grows",
    )
    where.add_argument(
        "--tracking-uri", metavar="URI", help="address of MLflow ($MLFLOW_TRACKING_URI, or its own default store)"
    )
    return parser


def matrix_request(arguments: argparse.Namespace) -> MatrixRequest:
    """Raises UsageError, for an option too that a matrix, which searches nothing, cannot heed."""
    from .matrix.plan import MatrixRequest

    check_values(arguments)
    usual = parser().parse_args([])
    given = [name for name in _OF_SEARCHES if getattr(arguments, name) != getattr(usual, name)]
    if given:
        raise UsageError(
            f"{', '.join('--' + name.replace('_', '-') for name in given)}: for searches only; the matrix "
            f"{arguments.space!r} measures each of its cells; leave it out"
        )
    output = Output.of(arguments.output)
    output.of_study("MATRIX")
    return MatrixRequest(
        space=arguments.space,
        model=arguments.model,
        source=text_source(arguments),
        names_text=(arguments.text, arguments.token_ids, arguments.dataset_name) != (None, None, None),
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        backends=_backends(arguments),
        cap=arguments.cap,
        workers=_worker_settings(arguments),
        rounds=arguments.confirm or 0,
        study=arguments.study,
        output=output.folder,
        copy=output.copy,
    )


def resolve(arguments: argparse.Namespace) -> SweepConfiguration:
    """Checks all that can be checked before anything is started. Raises UsageError."""
    from .configuration import ConfirmSettings, SearchSettings, SweepConfiguration

    check_values(arguments)
    source = text_source(arguments)
    space = load_space(arguments.space)
    backends = _backends(arguments)
    space = space.with_backends(backends) if backends else space
    search = SearchSettings(
        trials=arguments.trials,
        until=arguments.until,
        time_budget=None if arguments.time_budget is None else seconds(arguments.time_budget),
        sampler="front" if arguments.until is not None and arguments.sampler == "auto" else arguments.sampler,
        baseline_tokens=sample_size(arguments.baseline_tokens),
    )
    workers = _worker_settings(arguments)
    limit = None if arguments.max_ppl_increase is None else percent(arguments.max_ppl_increase)
    rounds = _ROUNDS if arguments.confirm is None else arguments.confirm
    confirm = ConfirmSettings(rounds=rounds, max_ppl_increase=limit)
    identity = _identity(arguments, source, space)
    output = Output.of(arguments.output)
    folder = output.of_study(identity.study)
    if output.copy is not None and not arguments.dry_run:
        bring_back(output.copy, StudyFolder(folder), identity.study)
    configuration = SweepConfiguration(
        output=folder,
        identity=identity.with_digests(),
        search=search,
        workers=workers,
        confirm=confirm,
    )
    on_cuda = load_space(arguments.space, {"cuda"}).under(identity.cap)
    on_cuda = on_cuda.with_backends(backends) if backends else on_cuda
    if on_cuda == identity.space or configuration.goes_on():  # a study keeps the space it began with
        return configuration
    if not _has_cuda(arguments.address, arguments.dry_run):
        return configuration
    return replace(configuration, identity=replace(configuration.identity, space=on_cuda))


def _backends(arguments: argparse.Namespace) -> list[str]:
    """Those that were given. Raises UsageError."""
    from streamllm.engine.backends import BACKENDS

    names = [] if arguments.backends is None else [name.strip() for name in arguments.backends.split(",")]
    for name in names:
        if name not in BACKENDS:
            raise UsageError(
                f"backends {shown(arguments.backends)}: {shown(name)} must be one of {', '.join(BACKENDS)}"
            )
    return list(dict.fromkeys(names))


def _worker_settings(arguments: argparse.Namespace) -> WorkerSettings:
    """Raises UsageError, for a cluster too that does not answer."""
    from .configuration import WorkerSettings
    from .workers.cluster import check_answers, resources_here
    from .workers.room import Room
    from .workers.temporary import check_temporary_folder

    check_temporary_folder(arguments.address)
    workers = WorkerSettings(
        count=arguments.workers,
        cpus=arguments.cpus_per_worker,
        address=arguments.address,
        trial_timeout=arguments.trial_timeout,
        load_timeout=arguments.load_timeout,
        timing=arguments.timing,
    )
    joined = workers.address or os.environ.get("RAY_ADDRESS")
    if joined and not arguments.dry_run:
        check_answers(joined)
    if (here := resources_here(workers.address)) is not None:
        Room.of([here], workers)
        if workers.timing == "concurrent" and not here["GPU"]:
            raise UsageError(
                "timing concurrent: must be auto or exclusive here, where there is no accelerator: workers on cores "
                "share caches, memory and clock; leave it out"
            )
    return workers


def _identity(arguments: argparse.Namespace, source: TextSource, space: SearchSpace) -> Identity:
    from streamllm.engine.loading import trained_length

    from .configuration import Identity, total_kv

    more = [*_backends(arguments), *([str(arguments.cap)] if arguments.cap is not None else [])]
    usual = study_name(model_label(arguments.model), source.label, space.name, *more)
    trained = trained_length(arguments.model)
    cap = total_kv(arguments.cap, space.cap, trained and trained // space.keys_per_total)
    return Identity(
        study=usual if arguments.study is None else arguments.study,
        model=arguments.model,
        source=source,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        space=space.under(cap),
        cap=cap,
        seed=arguments.seed,
    )


def _has_cuda(address: str | None, dry_run: bool) -> bool:
    """Whether workers will be on CUDA devices; a dry run does not join a cluster to ask, and takes it for granted."""
    from .workers.device_kinds import device_kinds

    joins = address is not None or bool(os.environ.get("RAY_ADDRESS"))
    return (dry_run and joins) or "cuda" in device_kinds(address)


def seconds(text: str) -> float:
    """The seconds in a time such as 90s, 30m, 2h or 1h30m. Raises UsageError."""
    from .configuration import MOST_SECONDS

    match = re.fullmatch(r"(?:(\d{1,12})h)?(?:(\d{1,12})m)?(?:(\d{1,12})s?)?", text)
    total = sum(int(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    if not 0 < total <= MOST_SECONDS:
        raise UsageError(f"time budget {shown(text)}: must be a time such as 90s, 30m, 2h or 1h30m")
    return float(total)
