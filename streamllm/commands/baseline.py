"""The fixed baseline: for every token the model runs anew on the last S + W tokens. It is measured once; whatever is
compared with it later finds it in the store.

examples:
python -m streamllm baseline                                            of the embedded model and text
python -m streamllm baseline --n-sink 4 --window-size 2044 --model EleutherAI/pythia-2.8b --dataset-name pg19
python -m streamllm baseline --runs 3 --output-file results/baselines/testbed_baseline_avg.json
python -m streamllm baseline --n-sink 4 --window-size 2044 --output-dir results/baselines   of WikiText and of PG19
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..configuration import Configuration
from ..errors import UsageError
from ..evaluating import Measuring, baseline_runs, measurements_beside
from ..measuring.baseline import average
from ..measuring.reference_time import with_times
from ..measuring.text import TextSource
from ..terminal.arguments import (
    add_measuring_arguments,
    add_model_arguments,
    add_policy_arguments,
    add_sample_argument,
    add_text_arguments,
    complete_policy,
    given_policy,
    load_asked_with,
    measuring,
    text_source,
)
from ..terminal.output import make_room, messages_on_stderr, report
from ..terminal.printing import say
from ..terminal.refused_flags import OF_BASELINES, OF_EVALUATIONS, refuse_what_is_not_done
from ..terminal.tracking import Result, Tracking, add_tracking_arguments

if TYPE_CHECKING:
    from ..engine.model import LoadedModel
    from ..measuring.text import TokenStream

HELP = "measure the re-computation baseline once, for everything that is compared with it"
_FIXED = {"wikitext": 4096, "pg19": 20_000}
"""The data sets of the source documents' fixed baselines, and how many tokens of each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is measured")
    add_model_arguments(what)
    add_text_arguments(what)
    add_policy_arguments(parser.add_argument_group("the policy whose total S + W + X is the baseline's window"))
    how = parser.add_argument_group("how it is measured")
    add_measuring_arguments(how)
    add_sample_argument(how, "five minutes")
    how.add_argument(
        "--runs",
        type=int,
        default=1,
        metavar="N",
        help="the mean of at least N runs, with its spread; all that are stored count (1)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one flat JSON object of each text on stdout, nothing else")
    output.add_argument(
        "--output-file",
        "--output",
        type=Path,
        metavar="FILE",
        help="write JSON with the object `baseline`, and of several `runs`",
    )
    output.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="write it as DIR/TEXT_baseline_avg.json; where no text is named, of two: wikitext (4096 tokens) and pg19 "
        "(20000)",
    )
    add_tracking_arguments(output)
    refuse_what_is_not_done(parser, (*OF_BASELINES, *OF_EVALUATIONS))


def run(arguments: argparse.Namespace) -> int:
    files = _files(arguments)
    given_policy(arguments)
    how = measuring(arguments)
    if arguments.runs < 1:
        raise UsageError(f"runs {arguments.runs}: must be a whole number >= 1")
    make_room(*files.values())

    from ..measuring.quality import NonFiniteLossError

    loaded, streams = load_asked_with(arguments, list(files))
    for stream, file in zip(streams, files.values(), strict=True):
        try:
            _measure(arguments, how, loaded, stream, file)
        except NonFiniteLossError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def _files(arguments: argparse.Namespace) -> dict[TextSource, Path | None]:
    """The texts, and where the baseline of each is written. Raises UsageError."""
    source, folder = text_source(arguments), arguments.output_dir
    if folder is None:
        return {source: arguments.output_file}
    if arguments.output_file is not None:
        raise UsageError("output-file and output-dir: a file and a folder of files; give one of them")
    sources = [source]
    if source.text is None and source.token_ids is None and source.dataset_name is None:
        sources = [
            replace(source, dataset_name=name, max_eval_tokens=source.max_eval_tokens or most)
            for name, most in _FIXED.items()
        ]
        for one in sources:
            one.check()
    return {one: folder / f"{one.label}_baseline_avg.json" for one in sources}


def _measure(
    arguments: argparse.Namespace, how: Measuring, loaded: "LoadedModel", stream: "TokenStream", file: Path | None
) -> None:
    """Of one text. Raises NonFiniteLossError."""
    what = Configuration("recompute", complete_policy(arguments, loaded), arguments.attn_backend)
    measurements = measurements_beside(what.policy, loaded, stream, arguments.store, how.protocol)
    tracking = Tracking(arguments, "baseline")
    subject = measurements.keys.identity(what, how.protocol) | {"backend_requested": what.backend}
    with messages_on_stderr(), tracking.measuring(subject):
        runs = baseline_runs(measurements, what, how, arguments.runs)
    records = with_times([run for run, _ in runs])
    (record,) = with_times([average(runs)[0]])
    single = {"runs": [one.to_json() for one in records]} if len(runs) > 1 else {}
    written = {"baseline": record.to_json(), **single}
    if file is not None:
        file.write_text(json.dumps(written, indent=2) + "\n")
    say(json.dumps(record.to_json()) if arguments.json else report({"baseline": record}))
    documents = {"result.json": record.to_json(), "baseline.json": written}
    repeats = [
        Result(record=one, name=f"run {number} of {len(records)}", documents={"result.json": one.to_json()})
        for number, one in enumerate(records if single else (), 1)
    ]
    tracking.log(Result(record=record, documents=documents, losses=runs[0][1], repeats=repeats))
