"""Writes without end in constant memory, until Ctrl-C or --max-new-tokens. On a terminal with the size of the cache and
the pace beneath the text; elsewhere the plain text on stdout, and one line about it on stderr.

examples:
python -m streamllm generate                                 the embedded model
python -m streamllm generate --dense                         and beside it what becomes of it without StreamingLLM
python -m streamllm generate --n-sink 0                      without sinks
python -m streamllm generate --model EleutherAI/pythia-410m --prompt "The history of" --top-p 0.9
python -m streamllm generate --max-new-tokens 10000 > text.txt
"""

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from threading import Event
from typing import TYPE_CHECKING, Protocol

from ..configuration import Configuration
from ..errors import UsageError
from ..terminal.arguments import (
    add_method_argument,
    add_model_arguments,
    add_policy_arguments,
    add_threads_argument,
    given_stream_policy,
    stream_policy,
)
from ..terminal.output import messages_on_stderr
from ..terminal.printing import discard, say
from ..terminal.progress import working

if TYPE_CHECKING:
    from ..explain.writing import Writer

HELP = "write without end in constant memory, and watch it"


class Output(Protocol):
    def add(self, title: str, text: str) -> None: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is written")
    add_model_arguments(what)
    what.add_argument("--prompt", metavar="TEXT", help="how the text begins (a few words)")
    what.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens to write (no end)")
    what.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 picks the likeliest token (0.8)")
    what.add_argument(
        "--top-k", type=int, default=40, metavar="K", help="pick from the K likeliest only; 0: from all (40)"
    )
    what.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="pick from the likeliest that have probability P together (1: all)",
    )
    what.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling (0)")
    policy = parser.add_argument_group("the policy")
    add_method_argument(policy, default="ring")
    add_policy_arguments(policy)
    policy.add_argument("--dense", action="store_true", help="show beside it the same without any eviction")
    add_threads_argument(parser.add_argument_group("how it is run"))


def run(arguments: argparse.Namespace) -> int:
    given_stream_policy(arguments)
    limit, terminal = arguments.max_new_tokens, sys.stdout.isatty()
    if limit is not None and limit < 1:
        raise UsageError(f"max_new_tokens {limit}: must be >= 1, or left out for no end")
    if arguments.dense and limit is None and not terminal:
        raise UsageError("dense: two texts without end go on a terminal only; give --max-new-tokens N")
    if sys.stderr.isatty():
        print("loading ...", end="\r", file=sys.stderr, flush=True)
    writers = _writers(arguments)
    started = time.perf_counter()
    with _interruption() as interrupted, _output(writers, terminal) as output:
        try:
            prompt = arguments.prompt if arguments.prompt is not None else _prompt(arguments.model)
            for title, writer in writers.items():
                output.add(title, writer.read(prompt))
            for _ in count() if limit is None else range(limit):
                if interrupted.is_set():
                    break
                for title, writer in writers.items():
                    output.add(title, writer.write())
        except BrokenPipeError:  # `| head` has seen enough
            discard(sys.stdout)
    _summarize(writers, time.perf_counter() - started)
    return 0


@contextmanager
def _interruption() -> Iterator[Event]:
    """Ctrl-C sets the event, so that no token is left half done."""
    interrupted = Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _writers(arguments: argparse.Namespace) -> "dict[str, Writer]":
    """The writers by the title they are shown under."""
    from ..explain.writing import Sampler, Sampling, Writer

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)

    from ..engine.decoder import make_decoder
    from ..engine.device import limit_threads
    from ..engine.loading import load_model, load_tokenizer

    limit_threads(arguments.threads)
    with messages_on_stderr(), working(f"loading {arguments.model}"):
        loaded = load_model(arguments.model, arguments.dtype, quantization=arguments.quantization)
    tokenizer = load_tokenizer(arguments.model)
    policy = stream_policy(arguments, loaded)
    shown = {f"{arguments.method}: {policy.n_sink} sinks, {policy.window_size} recent tokens": arguments.method}
    if arguments.dense:
        shown["dense: nothing is evicted"] = "dense"
    configurations = {title: Configuration(method, policy) for title, method in shown.items()}
    return {
        title: Writer(
            loaded,
            tokenizer,
            make_decoder(loaded, what),
            Sampler(sampling, loaded.device, arguments.seed),
            loaded.kept_bytes(what.effective),
        )
        for title, what in configurations.items()
    }


def _prompt(model: str) -> str:
    return "The with statement" if model == "testbed" else "Once upon a time"


class _Plain:
    """One text as it comes; two one after the other, at the end."""

    def __init__(self, titles: list[str]) -> None:
        self.texts: dict[str, list[str]] = {title: [] for title in titles}

    def add(self, title: str, text: str) -> None:
        if len(self.texts) == 1:
            print(text, end="", flush=True)
        else:
            self.texts[title].append(text)

    def finish(self) -> None:
        for title, pieces in self.texts.items():
            if pieces:
                say(f"=== {title} ===\n{''.join(pieces)}\n")
        if len(self.texts) == 1:
            say("")


@contextmanager
def _output(writers: "dict[str, Writer]", terminal: bool) -> Iterator[Output]:
    if terminal:
        from ..terminal.screen import Screen

        with Screen(writers) as screen:
            yield screen
        return
    plain = _Plain(list(writers))
    yield plain
    plain.finish()


def _summarize(writers: "dict[str, Writer]", seconds: float) -> None:
    from ..engine.device import used_memory

    for title, writer in writers.items():
        name = f"{title}: " if len(writers) > 1 else ""
        held, done = writer.status
        memory = used_memory(writer.loaded.device)
        print(f"{name}{done}; {held}; memory {memory:,.0f} MiB; {seconds:.1f} s in all", file=sys.stderr)
