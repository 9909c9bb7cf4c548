"""Bad input of all kinds, made at random from good: is it taken, or refused with one line, soon and in little memory?

python -m tests.fuzz.inputs [--seed N] [--minutes M] [--kind KIND ...]    for longer than the suite does, all kinds
python -m tests.fuzz.inputs --kind KIND --case SEED:NUMBER                one case again, with its traceback

A case is named by its kind, the seed and a number, and nothing else decides what it is.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

from orchestrator import sweep
from orchestrator.search.points import check_cap, check_methods, check_possible
from search_spaces import SHIPPED, is_matrix, load_matrix, load_space
from search_spaces.reader import FOLDER
from streamllm import __main__ as commands
from streamllm.environment import read_env_file
from streamllm.errors import UsageError
from streamllm.testbed import MODEL_FOLDER
from tests.conftest import GOLDEN
from tests.fuzz.mutations import NUMBERS, damaged_bytes, damaged_tree, odd_value, odd_word
from tests.refusals import MOST_CHARACTERS, within

SECONDS, MIB = 20, 3072
"""That a case may take, many times what any does."""
Kind = Callable[[random.Random], None]
"""Makes an input in the working directory and has it read. Raises UsageError."""


def space(chance: random.Random) -> None:
    good = (FOLDER / f"{chance.choice(SHIPPED)}.yaml").read_bytes()
    Path("fuzzed.yaml").write_bytes(_damaged(chance, good, yaml.safe_load, _as_yaml))
    if is_matrix("fuzzed.yaml"):
        load_matrix("fuzzed.yaml")
        return
    cap = chance.choice((1, 64, 2048))
    found = load_space("fuzzed.yaml", {"cuda"} if chance.random() < 0.5 else ()).under(cap)
    assert found.size > 0
    check_methods(found)
    check_cap(found, cap)
    check_possible(found, cap)


def env(chance: random.Random) -> None:
    good = (
        b"# mine\nSTREAMLLM_MODEL=testbed\nexport STREAMLLM_DATASET='pg19'\nHF_HOME=\"/cache\"\nFLASH_SDPA=1\nOTHER=x\n"
    )
    Path(".env").write_bytes(damaged_bytes(chance, good))
    read_env_file()


def model(chance: random.Random) -> None:
    from streamllm.engine.loading import check_files, load_model, load_tokenizer, trained_length, weights_digest

    folder = Path("fuzzed")
    shutil.copytree(GOLDEN / chance.choice(("llama-tiny", "neox-tiny")), folder)
    for file in MODEL_FOLDER.glob("tokenizer*"):
        shutil.copy(file, folder)
    if chance.random() < 0.3:
        _share_out(folder)
    damaged = chance.choice(sorted(folder.iterdir()))
    if damaged.suffix == ".json":
        damaged.write_bytes(_damaged(chance, damaged.read_bytes(), json.loads, _as_json))
    else:
        content = damaged.read_bytes()
        edge = chance.choice((8, 200, 4000, len(content)))
        damaged.write_bytes(damaged_bytes(chance, content[:edge]) + content[edge:])
    name = str(folder) if chance.random() < 0.5 else str(folder.resolve())
    trained_length(name)
    check_files(name)
    weights_digest(name)
    tokenizer = load_tokenizer(name)
    Path("fuzzed.txt").write_text("some words, and some more of them; 1234\n" * 9)
    _read_text("fuzzed.txt", lambda: tokenizer)
    with warnings.catch_warnings(action="ignore"):
        load_model(name, "float32")
    if chance.random() < 0.1:  # a second or two
        _run(lambda: sweep.main(["--dry-run", "--space=sink", "--text=fuzzed.txt", f"--model={name}"]))


def _share_out(folder: Path) -> None:
    """The weights in two files and an index."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(sorted(weights))}
    for part in sorted(set(where.values())):
        save_file({name: weights[name] for name in where if where[name] == part}, folder / part, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def gguf(chance: random.Random) -> None:
    from streamllm.engine.gguf import _read

    Path("fuzzed.gguf").write_bytes(damaged_bytes(chance, good_gguf()))
    _read(Path("fuzzed.gguf"))


@cache
def good_gguf() -> bytes:
    import numpy as np
    from gguf import GGUFWriter

    with tempfile.TemporaryDirectory() as folder:
        writer = GGUFWriter(f"{folder}/good.gguf", "llama")
        writer.add_file_type(0)
        writer.add_block_count(2)
        writer.add_token_list(["a", "b", "c"])
        writer.add_tensor("token_embd.weight", np.ones((3, 8), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Path(folder, "good.gguf").read_bytes()


def token_ids(chance: random.Random) -> None:
    from streamllm.measuring.text import TextSource, check_text

    good = json.dumps([chance.randrange(250) for _ in range(40)]).encode()
    Path("fuzzed.json").write_bytes(_damaged(chance, good, json.loads, _as_json))
    source = TextSource(token_ids=Path("fuzzed.json"), offset=chance.choice((0, 0, 7, 99, 10**18)))
    check_text(source, lambda: None, 256)


def text(chance: random.Random) -> None:
    from streamllm.engine.loading import load_tokenizer

    rows = [{"title": f"Book {number}", "text": f"Chapter {number}. It was a night.\n" * 5} for number in range(4)]
    name = chance.choice(("fuzzed.txt", "fuzzed.json", "fuzzed.jsonl", "fuzzed.parquet"))
    if name.endswith(".json"):
        content = _damaged(chance, json.dumps(rows).encode(), json.loads, _as_json)
    elif name.endswith(".jsonl"):
        content = damaged_bytes(chance, "\n".join(map(json.dumps, rows)).encode())
    elif name.endswith(".parquet"):
        content = damaged_bytes(chance, _parquet_file(json.dumps(rows)))
    else:
        content = damaged_bytes(chance, rows[0]["text"].encode() * 20)
    Path(name).write_bytes(content)
    _read_text(name, lambda: load_tokenizer("testbed"), chance)


@cache
def _parquet_file(rows: str) -> bytes:
    import pandas as pd

    content = io.BytesIO()
    pd.DataFrame(json.loads(rows)).to_parquet(content)
    return content.getvalue()


def _read_text(name: str, tokenizer: Callable[[], Any], chance: random.Random | None = None) -> None:
    from streamllm.measuring.text import TextSource, check_text, load_tokens

    options: dict[str, Any] = {}
    if chance is not None and chance.random() < 0.3 and not name.endswith(".txt"):
        options = {"book": chance.choice(("0", "3", "-1", "4", "Book 2", odd_word(chance)))}
    source = TextSource(text=Path(name), offset=0 if chance is None else chance.choice((0, 5, 10**6)), **options)
    check_text(source, tokenizer, None)
    load_tokens(source, tokenizer(), sys.maxsize)


def python(chance: random.Random) -> None:
    """The typed entry points, given what a type checker would refuse."""
    from streamllm.configuration import Configuration
    from streamllm.evaluating import Measuring
    from streamllm.measuring.text import TextSource
    from streamllm.policy import EvictionPolicy

    names = (
        "text",
        "token_ids",
        "dataset_name",
        "dataset_config",
        "split",
        "offset",
        "max_eval_tokens",
        "book",
        "join",
    )
    if chance.random() < 0.5:
        TextSource(**{chance.choice(names): odd_value(chance) for _ in range(2)}).check()
    knobs = [field.name for field in fields(EvictionPolicy)]
    policy = EvictionPolicy(**{chance.choice(knobs): chance.choice((odd_value(chance), 7)) for _ in range(2)})
    Configuration("ours", policy)
    Measuring(baseline_tokens=chance.choice((-1, 0, None, 10**30)), protocol=chance.choice(("fast", odd_word(chance))))


_VALUES = {
    "--trials": "16", "--time-budget": "10m", "--workers": "1", "--cpus-per-worker": "1", "--trial-timeout": "60",
    "--load-timeout": "60", "--confirm": "3", "--baseline-tokens": "all", "--max-ppl-increase": "3", "--seed": "1",
    "--cap": "64", "--study": "mine", "--output": "out", "--offset": "3", "--max-eval-tokens": "300", "--book": "Night",
    "--split": "test", "--text": "good.txt", "--token-ids": "good.json", "--model": "testbed", "--space": "sink",
    "--dtype": "float32", "--sampler": "random", "--join": "lines", "--dataset-config": "x",
}  # fmt: skip
_OF_COMMANDS = {
    "--n-sink": "4", "--window-size": "60", "--compress-every": "2", "--cache-slack": "1", "--max-drop": "3",
    "--threads": "1", "--store": "store", "--method": "ours", "--protocol": "fast", "--prefill-tokens": "9",
    "--overlap": "2", "--refresh-budget": "2", "--runs": "2", "--output-file": "out.json", "--output-dir": "out",
    "--per-token-losses": "out.npy", "--intervals": "4", "--prompt": "a", "--max-new-tokens": "3", "--temperature": "1",
    "--top-k": "3", "--top-p": "0.5", "--head-size": "64", "--execution": "eager", "--attn-backend": "math",
}  # fmt: skip


_VARIABLES = ("STREAMLLM_MODEL", "STREAMLLM_DATASET", "STREAMLLM_DATA", "FLASH_SDPA", "TMPDIR", "RAY_TMPDIR")


def _arguments(chance: random.Random, usual: dict[str, str]) -> list[str]:
    Path("good.txt").write_text("a night of words and words\n" * 40)
    Path("good.json").write_text(json.dumps(list(range(200))))
    given: list[str] = []
    for option in chance.sample(sorted(usual), chance.choice((1, 1, 2, 3))):
        odd = odd_word(chance) if chance.random() < 0.6 else repr(chance.choice(NUMBERS))
        value = odd.replace("\0", "") if chance.random() < 0.7 else usual[option]
        given.append(f"{option}={value}")
    return given


def sweeps_options(chance: random.Random) -> None:
    """All of a dry run but its cost, which takes seconds to find out, and its last word."""
    given = ["--dry-run", "--space=sink", *_arguments(chance, _VALUES)]
    if chance.random() < 0.3:
        os.environ[chance.choice(_VARIABLES)] = odd_word(chance).replace("\0", "")
    with mock.patch("orchestrator.dry_run._cost", lambda *_: "not asked"):
        _run(lambda: sweep.main(given))


def commands_options(chance: random.Random) -> None:
    """Up to where weights would be loaded."""
    command = chance.choice(("evaluate", "baseline", "diagnose", "profile", "generate"))
    known = argparse.ArgumentParser()
    import_module(f"streamllm.commands.{command}").add_arguments(known)
    usual = {
        option: value for option, value in (_VALUES | _OF_COMMANDS).items() if option in known._option_string_actions
    }
    given = ["x", command, *_arguments(chance, usual)]

    def loaded(*_: object, **__: object) -> None:
        raise UsageError("fuzz: no further")

    with (
        mock.patch.object(sys, "argv", given),
        mock.patch("streamllm.evaluating.load_model_and_texts", loaded),
        mock.patch("streamllm.engine.loading.load_model", loaded),
    ):
        try:
            _run(commands.main)
        except RefusedError as error:
            if not str(error).endswith("fuzz: no further"):  # else it was taken
                raise


def whole(chance: random.Random) -> None:
    """A dry run from its first to its last line."""
    Path("good.json").write_text(json.dumps(list(range(200))))
    given = ["--dry-run", "--token-ids=good.json", *_arguments(chance, {"--cap": "64", "--seed": "1", "--trials": "3"})]
    _run(lambda: sweep.main(given))


class RefusedError(UsageError):
    """What a command printed."""


def _run(main: Callable[[], int]) -> None:
    """Raises what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    said = err.getvalue().rstrip("\n")
    assert code == (2 if said.startswith("error: ") else 0), (code, said)
    if code:
        raise RefusedError(said.removeprefix("error: "))


KINDS: dict[str, Kind] = {
    kind.__name__: kind
    for kind in (space, env, model, gguf, token_ids, text, python, sweeps_options, commands_options, whole)
    if kind is not gguf or find_spec("gguf") is not None
}


def _damaged(chance: random.Random, good: bytes, read: Callable[[bytes], Any], write: Callable[[Any], bytes]) -> bytes:
    """A file whose bytes are damaged, or what it says."""
    if chance.random() < 0.3:
        return damaged_bytes(chance, good)
    with contextlib.suppress(ValueError, UnicodeEncodeError, yaml.YAMLError):  # what cannot be written down at all
        return write(damaged_tree(chance, read(good)))
    return damaged_bytes(chance, good)


def _as_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def _as_yaml(tree: Any) -> bytes:
    return yaml.safe_dump(tree, allow_unicode=True, sort_keys=False).encode()


@dataclass(frozen=True, slots=True)
class Outcome:
    said: str
    """The refusal; empty where the input was taken."""
    wrong: str = ""
    """What was wrong with it, a traceback maybe."""
    seconds: float = 0.0


def attempt(kind: str, seed: int, number: int) -> Outcome:
    """One case, in an empty folder of its own."""
    _import_all()
    started = time.monotonic()
    with _elsewhere():
        try:
            with within(SECONDS, MIB):
                KINDS[kind](random.Random(f"{kind} {seed} {number}"))
            outcome = Outcome("")
        except UsageError as error:
            outcome = Outcome(str(error), _wrong_with(str(error)))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = Outcome("", traceback.format_exc())
    return Outcome(outcome.said, outcome.wrong, time.monotonic() - started)


def _wrong_with(message: str) -> str:
    if not message.isprintable() and any(c in message for c in "\n\r\0"):
        return f"not one line: {message!r}"
    if len(message) > MOST_CHARACTERS:
        return f"{len(message)} characters: {message}"
    names_something = re.search(r"fuzz|mine|[\d':]|ForCausalLM", message)
    return "" if names_something else f"names nothing: {message}"


@cache
def _import_all() -> None:
    """What takes seconds, and is no case's fault."""
    from transformers import AutoModelForCausalLM

    from streamllm.engine import loading

    assert AutoModelForCausalLM and loading


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    """In an empty folder, with an environment and a number of threads that are forgotten again."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), mock.patch.dict(os.environ):
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="0 is the suite's")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--case", metavar="SEED:NUMBER", help="one case of the kind again")
    given = parser.parse_args()
    if given.case is not None:
        seed, number = map(int, given.case.split(":"))
        print(attempt(given.kind[0], seed, number))
        return 0
    found: Counter[str] = Counter()
    until, number, slowest = time.monotonic() + 60 * given.minutes, 0, (0.0, "")
    while time.monotonic() < until:
        for kind in given.kind if number % 40 == 0 else [one for one in given.kind if one != "whole"]:
            outcome = attempt(kind, given.seed, number)
            found[f"{kind}: {'wrong' if outcome.wrong else 'refused' if outcome.said else 'taken'}"] += 1
            slowest = max(slowest, (outcome.seconds, f"--kind {kind} --case {given.seed}:{number}"))
            if outcome.wrong:
                print(f"--kind {kind} --case {given.seed}:{number}\n{outcome.wrong}\n", flush=True)
        number += 1
    for name, count in sorted(found.items()):
        print(f"{name:32}{count:8}")
    print(f"the slowest took {slowest[0]:.1f} s: {slowest[1]}")
    return int(any(name.endswith("wrong") for name in found))


if __name__ == "__main__":
    from tests.fuzz.inputs import main  # whose module the tests know

    sys.exit(main())
