"""A trial as what runs elsewhere: a script with `StreamingCache`, a `custom_generate` folder, llama.cpp's flags; each
with what it does not do of what was measured."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from textwrap import wrap

from streamllm.configuration import Configuration
from streamllm.engine.methods import sampled_losses
from streamllm.errors import UsageError
from streamllm.policy import EvictionPolicy
from streamllm.results.schema import AnyRow, knobs_in_short
from streamllm.results.study import StudyResults

_WIDTH = 110
_PAD = 256
"""llama.cpp's contexts are multiples of it (since pull request 17046)."""
_CACHE_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "f16", "float8_e4m3": "q8_0", "float64": "f32"}
"""llama.cpp's nearest to ours. It cannot turn keys in bf16."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What was measured of it."""

    study: str
    number: int | str
    model: str
    what: Configuration
    dtype: str
    peak_kv: int
    has_bos: bool

    @classmethod
    def of(cls, study: StudyResults, row: AnyRow) -> Trial:
        """Raises UsageError for one that has no cache to stream with."""
        what = Configuration.of_row(row)
        if sampled_losses(what.method) is not None or what.policy.compress_every == 0 or what.method == "dense":
            raise UsageError(
                f"trial {row['trial']}: {what} evicts nothing from a cache; give one that does, with --trial"
            )
        model, has_bos = str(study.configuration["model"]), bool(row.get("bos"))
        return cls(study.name, row["trial"], model, what, str(row["dtype"]), int(row["peak_kv"]), has_bos)

    @property
    def policy(self) -> EvictionPolicy:
        """As its method means it."""
        return self.what.effective

    @property
    def title(self) -> str:
        return f"Trial {self.number} of study {self.study}: {self.what}"


def streaming_cache(trial: Trial) -> dict[str, str]:
    """A script that streams."""
    policy = trial.policy
    return {
        "stream.py": f"""{_comments(trial.title, *_not_in_a_cache(trial))}
from streamllm import StreamingCache
from streamllm.engine.loading import resolve_model
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

name = resolve_model({trial.model!r})
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.{trial.dtype})
tokenizer = AutoTokenizer.from_pretrained(name)
cache = StreamingCache(model, n_sink={policy.n_sink}, window_size={policy.window_size})
prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
model.generate(
    prompt,
    past_key_values=cache,
    max_new_tokens={4 * policy.kept},
    do_sample=True,
    eos_token_id=None,
    streamer=TextStreamer(tokenizer),
)
print(cache.get_seq_length(), "tokens seen,", cache.layers[0].keys.shape[2], "in the cache")
"""
    }


def custom_generate(trial: Trial) -> dict[str, str]:
    """A folder that `generate` takes, beside a model's files or by itself."""
    policy, folder = trial.policy, "custom_generate"
    call = 'model.generate(**inputs, custom_generate="THIS FOLDER", trust_remote_code=True, max_new_tokens=1000)'
    return {
        f"{folder}/generate.py": f'''{_comments(trial.title, *_not_in_a_cache(trial))}
from streamllm import StreamingCache


def generate(model, past_key_values=None, **arguments):
    """As `model.generate`, with {policy.n_sink} sinks and the last {policy.window_size} tokens in the cache."""
    if past_key_values is None:
        past_key_values = StreamingCache(model, n_sink={policy.n_sink}, window_size={policy.window_size})
    return model.generate(past_key_values=past_key_values, **arguments)
''',
        f"{folder}/requirements.txt": "streamllm-sweep\n",
        "README.md": "\n".join(
            [
                "# generate with attention sinks\n",
                f"{trial.title}.\n",
                f"    {call}\n",
                "It needs streamllm-sweep, installed from its folder (`pip install .`).\n",
                "Not as it was measured:\n",
                *(f"- {one}" for one in _not_in_a_cache(trial)),
                "",
            ]
        ),
    }


def llama_cpp(trial: Trial) -> dict[str, str]:
    """A command line."""
    policy, context = trial.policy, _context(trial)
    weights = trial.model if trial.model.endswith(".gguf") else "MODEL.gguf"
    cached = _CACHE_TYPES[trial.dtype if policy.kv_dtype == "auto" else policy.kv_dtype]
    quantized = " -fa on" if cached == "q8_0" else ""
    flags = f"-c {context} --keep {_keep(trial)} --context-shift -n -1 -ctk {cached} -ctv {cached}{quantized}"
    command = f'llama-completion -m {shlex.quote(weights)} {flags} -p "Once upon a time"'
    return {"llama.sh": f"{_comments(trial.title, *_not_in_llama_cpp(trial, context, cached))}{command}\n"}


TARGETS: Mapping[str, Callable[[Trial], dict[str, str]]] = {
    "streaming-cache": streaming_cache,
    "custom-generate": custom_generate,
    "llama.cpp": llama_cpp,
}
"""Each makes files, by name."""


def of_halves(trial: Trial, context: int) -> EvictionPolicy:
    """The policy that llama.cpp follows with that context: where the next token would fill it, half of what is not kept
    is discarded."""
    kept = trial.policy.n_sink
    left = context - 1 - kept
    window = left - left // 2
    return EvictionPolicy(n_sink=kept, window_size=window, cache_slack=context - 2 - kept - window)


def _context(trial: Trial) -> int:
    """No larger than the cache that was measured, unless that is smaller than the smallest there is."""
    return max((trial.peak_kv - 1) // _PAD * _PAD, math.ceil((trial.policy.n_sink + 4) / _PAD) * _PAD)


def _keep(trial: Trial) -> int:
    """llama.cpp keeps a BOS besides."""
    return max(trial.policy.n_sink - trial.has_bos, 0)


def _not_in_a_cache(trial: Trial) -> Iterator[str]:
    """What `StreamingCache` does not do of what was measured."""
    policy = trial.policy
    strict = EvictionPolicy(n_sink=policy.n_sink, window_size=policy.window_size)
    if policy.compress_every > 1 or policy.cache_slack or policy.max_drop:
        widest = max(trial.peak_kv - 1 - policy.n_sink, 1)
        yield (
            f"It evicts at every token: {strict.kept + 1} keys at most are attended to, where the trial had up to "
            f"{trial.peak_kv}. Its perplexity is that of {knobs_in_short(strict.named)}; window_size={widest} has "
            f"the trial's largest cache."
        )
    if policy.keeps_positions:
        yield "It numbers what is left anew: positions=keep is not to be had."
    if policy.kv_dtype != "auto":
        yield f"It keeps keys and values in the model's {trial.dtype}, not in {policy.kv_dtype}."
    if not policy.is_uniform:
        yield f"It holds as much in every layer: layer_budgets={policy.layer_budgets} is not to be had."
    if trial.what.quantization not in (None, "none"):
        yield f"Weights are as they are loaded: quantize them by {trial.what.quantization} (torchao) yourself."
    yield (
        f"Times were taken of method {trial.what.method} with kernel {trial.what.backend}, {trial.what.execution}; the "
        f"model's own forward and `generate` have others."
    )
    yield "A prompt goes in as one piece, whose tokens see all of it before them, however long it is."


def _not_in_llama_cpp(trial: Trial, context: int, cached: str) -> Iterator[str]:
    policy, halves = trial.policy, of_halves(trial, context)
    options = f"--n-sink {halves.n_sink} --window-size {halves.window_size} --cache-slack {halves.cache_slack}"
    yield (
        f"It evicts when its context is full, and then half of what is not kept: from {context - 1} to {halves.kept} "
        f"tokens. R, slack and max drop of the trial are not to be had. What that costs in quality:\n"
        f"python -m streamllm evaluate --model {shlex.quote(trial.model)} {options}"
    )
    yield f"-c is a multiple of {_PAD}, as llama.cpp makes it; the trial attended to up to {trial.peak_kv} keys."
    if trial.has_bos and policy.n_sink:
        yield f"The first of the {policy.n_sink} sinks is the BOS, which it keeps besides --keep."
    elif trial.has_bos:
        yield "It keeps the BOS, the trial had no sinks."
    if policy.n_sink > 1:
        yield "--keep counts tokens of the prompt: with a shorter one, fewer are kept."
    yield (
        f"Each shift turns the keys that stay once more, in the cache's {cached}: rounding adds up, where ours turns "
        f"from what the model computed."
    )
    if cached == "f16" and "bfloat16" in (trial.dtype, policy.kv_dtype):
        yield "It cannot shift keys in bf16: f16 is taken."
    if cached == "q8_0":
        yield "It has no float8: q8_0 is the nearest, and another rounding."
    if policy.keeps_positions:
        yield "It numbers what is left anew: positions=keep is not to be had."
    if not policy.is_uniform:
        yield f"It holds as much in every layer: layer_budgets={policy.layer_budgets} is not to be had."
    yield (
        f"Weights are the GGUF file's; the trial's were {trial.dtype}, "
        f"quantization {trial.what.quantization or 'none'}. Its times are its own."
    )


def _comments(title: str, *lines: str) -> str:
    """As wide as code, but for commands, which are to be copied."""
    found = []
    for line in (f"{title}.", "Not as it was measured:", *(f"- {one}" for one in lines)):
        for part in line.split("\n"):
            is_command = part.startswith("python ")
            found += [f"  {part}"] if is_command else wrap(part, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return "".join(f"# {one}\n" for one in found)
