"""Any task of lm-evaluation-harness under any policy. Log-likelihoods come from the block-parallel evaluator, exact and
without decoding; text is written by the method's own decoder. What is in the store is not run again.

examples:
python -m streamllm harness --tasks lambada_openai --model smollm2 --window-size 252
python -m streamllm harness --tasks lambada_openai --model smollm2 --method dense                   as lm_eval's hf
python -m streamllm harness --tasks my_task --tasks-folder my_tasks --limit 100 --json
python -m streamllm harness --tasks ruler --model HF/MODEL --metadata '{"max_seq_lengths": [4096]}' --decoder evaluator
python -m streamllm.harness run --model streamllm --model_args pretrained=smollm2,n_sink=4 --tasks ...   lm_eval's own
"""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configuration import Configuration
from ..errors import shown
from ..terminal.arguments import (
    add_backend_arguments,
    add_method_argument,
    add_model_arguments,
    add_policy_arguments,
    add_store_argument,
    add_threads_argument,
    given_stream_policy,
    stream_policy,
)
from ..terminal.output import check_folder, make_room, messages_on_stderr
from ..terminal.printing import say
from ..terminal.progress import working
from ..terminal.tracking import Result, Tracking, add_tracking_arguments

if TYPE_CHECKING:
    from ..harness.model import StreamingLM
    from ..harness.tasks import TaskOptions

HELP = "tasks of lm-evaluation-harness under one policy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is run")
    what.add_argument("--tasks", required=True, metavar="A,B", help="names of tasks or groups, or task files (.yaml)")
    what.add_argument(
        "--tasks-folder", type=Path, metavar="DIR", help="of task files, whose tasks come before the harness' own"
    )
    add_model_arguments(what)
    what.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question (the task's)")
    what.add_argument("--limit", type=float, metavar="N", help="documents of a task; below 1 a share of them (all)")
    what.add_argument("--apply-chat-template", action="store_true", help="put requests in the model's chat template")
    what.add_argument("--system-instruction", metavar="TEXT", help="for the chat template, or before each request")
    what.add_argument(
        "--gen-kwargs", type=_object, default={}, metavar="JSON", help="over the tasks' generation_kwargs"
    )
    what.add_argument(
        "--metadata", type=_object, default={}, metavar="JSON", help="for tasks that take some, as RULER does"
    )
    what.add_argument(
        "--seed", type=int, metavar="N", help="of random, numpy, torch and of drawing examples (0,1234,1234,1234)"
    )

    policy = parser.add_argument_group("the policy")
    add_method_argument(policy, default="ours")
    add_policy_arguments(policy)

    how = parser.add_argument_group("how it is run")
    how.add_argument(
        "--decoder",
        choices=("method", "evaluator"),
        default="method",
        help="what writes text: the method's own decoder, or the evaluator, which computes the same but reads prompts "
        "in blocks, where decoders go token by token once their cache is full (method)",
    )
    how.add_argument(
        "--max-length", type=int, metavar="N", help="cut requests to N tokens, as lm_eval's hf does (nothing is cut)"
    )
    add_backend_arguments(how)
    add_threads_argument(how)
    add_store_argument(how)

    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    output.add_argument("--output-file", type=Path, metavar="FILE", help="write the JSON here too")
    add_tracking_arguments(output)


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{shown(text)}: must be a JSON object, for example {{"temperature": 0.7}}')
    return value


def run(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    given_stream_policy(arguments)
    check_folder("store", arguments.store)
    make_room(arguments.output_file)

    from ..harness import check_installed

    check_installed()
    with messages_on_stderr():
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from ..engine.loading import load_tokenizer, resolve_model
    from ..harness.results import facts_of, measured, merged, title
    from ..harness.tasks import Tasks, table
    from ..measuring.store import MeasurementStore

    options, names = _options(arguments), [name for name in arguments.tasks.split(",") if name]
    with working("finding tasks"):
        tasks = Tasks(names, options, load_tokenizer(arguments.model), resolve_model(arguments.model))
    model = _model(arguments)
    facts = facts_of(model)
    tracking, found = Tracking(arguments, "harness"), []
    with tracking.measuring(facts):
        for name in names:
            with working(f"reading {name}"):
                task = tasks.prepared(name)
            found.append(measured(MeasurementStore(arguments.store), model, task))
    together = merged(found)
    written = facts | {
        "reused": all(one["reused"] for one in found),
        "seconds": sum(one["seconds"] for one in found),
        "requests": sum(one["requests"] for one in found),
        **together,
    }
    if arguments.output_file is not None:
        arguments.output_file.write_text(json.dumps(written, indent=2) + "\n")
    say(json.dumps(written) if arguments.json else f"{title(written)}\n{table(together)}")
    tracking.log(Result(record=facts | written["scores"], documents={"result.json": written}))
    return 0


def _options(arguments: argparse.Namespace) -> "TaskOptions":
    from ..harness.tasks import SEEDS, TaskOptions

    return TaskOptions(
        folder=arguments.tasks_folder,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        apply_chat_template=arguments.apply_chat_template,
        system_instruction=arguments.system_instruction,
        seeds=SEEDS if arguments.seed is None else (arguments.seed,) * 4,
        gen_kwargs=arguments.gen_kwargs,
        metadata=arguments.metadata,
    )


def _model(arguments: argparse.Namespace) -> "StreamingLM":
    from ..engine.device import limit_threads
    from ..engine.loading import load_model, load_tokenizer
    from ..engine.probing import runnable
    from ..harness.model import Conventions, StreamingLM
    from ..harness.tasks import SEEDS
    from ..harness.writing import check_decoder

    check_decoder(arguments.decoder, arguments.method)
    seed = SEEDS[2] if arguments.seed is None else arguments.seed
    conventions = Conventions(max_length=arguments.max_length, decoder=arguments.decoder, seed=seed)
    limit_threads(arguments.threads)
    with working(f"loading {arguments.model}"):
        loaded = load_model(arguments.model, arguments.dtype, quantization=arguments.quantization)
    what = Configuration(arguments.method, stream_policy(arguments, loaded), arguments.attn_backend)
    what = runnable(what, loaded, arguments.strict)
    return StreamingLM(loaded, load_tokenizer(arguments.model), what, conventions)
