"""Where a token's time goes: what is counted as which part, and that looking changes nothing."""

import argparse
import gzip
import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from streamllm.commands import profile
from streamllm.configuration import Configuration
from streamllm.engine import attention
from streamllm.engine.decoder import make_decoder
from streamllm.errors import UsageError
from streamllm.explain.profiling import (
    ATTENTION,
    CACHE,
    ENDS,
    MLP,
    OTHER,
    STEP,
    _part,
    _profiler,
    _ranges,
    parts_of,
    profile_decoding,
    summed,
)
from streamllm.policy import EvictionPolicy

from .conftest import GOLDEN
from .tiny_models import FAMILIES, tiny_model

POLICY = EvictionPolicy(n_sink=2, window_size=30)


@dataclass
class Event:
    """What `summed` reads of a profiler's event."""

    name: str
    start: float
    end: float
    cpu_parent: "Event | None" = None
    device_type: DeviceType = DeviceType.CPU
    is_user_annotation: bool = False
    self_cpu_time_total: float = 0.0
    kernels: list = field(default_factory=list)

    @property
    def time_range(self):
        return SimpleNamespace(start=self.start, end=self.end)


def part(name, start, end, parent=None):
    return Event(f"streamllm: {name}", start, end, parent, is_user_annotation=True)


def test_a_cpus_operators_by_part():
    attending = part(ATTENTION, 0, 50)
    updating = part(CACHE, 20, 40, attending)
    linear, cat = Event("aten::linear", 1, 11, attending), Event("aten::cat", 21, 24, updating)
    sdpa = Event("aten::scaled_dot_product_attention", 25, 39, updating)
    inner = [Event("aten::addmm", 2, 10, linear, self_cpu_time_total=8), Event("aten::flash", 26, 38, sdpa)]
    outside = Event("aten::add", 60, 65, self_cpu_time_total=5)
    linear.self_cpu_time_total, cat.self_cpu_time_total = 2, 3
    busy, kernels, launches = summed([attending, updating, linear, cat, sdpa, *inner, outside])
    assert busy == {ATTENTION: 10 + 14, CACHE: 3, OTHER: 5}
    assert launches == 4
    assert list(kernels.items())[:3] == [("aten::addmm", (1, 8)), ("aten::add", (1, 5)), ("aten::cat", (1, 3))]


def test_a_gpus_kernels_by_the_part_that_launched_them():
    """The ranges are on the device's line too, where they are no kernels; a replayed graph's kernels are the rest."""
    attending = part(ATTENTION, 0, 9)
    updating = part(CACHE, 2, 8, attending)
    sdpa = Event("aten::scaled_dot_product_attention", 3, 5, updating)

    def launching(name, duration, parent):
        return Event(name, 3, 4, parent, kernels=[SimpleNamespace(duration=duration)])

    operators = [
        launching("aten::mm", 30, attending),
        launching("flash", 20, sdpa),
        launching("aten::cat", 5, updating),
    ]
    attending.kernels = [SimpleNamespace(duration=999)]
    on_gpu = [
        Event(name, 100, 100 + duration, device_type=DeviceType.CUDA)
        for name, duration in (("gemm", 30), ("flash_kernel", 20), ("copy", 5), ("gemm", 7))
    ]
    shadow = Event("streamllm: attention", 100, 170, device_type=DeviceType.CUDA, is_user_annotation=True)
    busy, kernels, launches = summed([attending, updating, sdpa, *operators, *on_gpu, shadow], STEP)
    assert {name: time for name, time in busy.items() if time} == {ATTENTION: 50, CACHE: 5, STEP: 7}
    assert launches == 4
    assert list(kernels.items()) == [("gemm", (2, 37)), ("flash_kernel", (1, 20)), ("copy", (1, 5))]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_parts(family):
    loaded = tiny_model(family, torch.float32)
    found = parts_of(loaded.model)
    names = [part for _, part in found]
    layers = loaded.model.config.num_hidden_layers
    assert (names.count(ATTENTION), names.count(MLP), names.count(ENDS)) == (layers, layers, 2)
    matrices = {id(p) for module, _ in found for p in module.parameters() if p.ndim > 1}
    assert matrices == {id(p) for p in loaded.model.parameters() if p.ndim > 1}, "no matrix is left out"


@pytest.mark.parametrize("method", ["ours", "mit", "ring", "recompute"])
def test_ranges_change_nothing_and_leave_nothing(method, golden_model, golden_tokens):
    loaded = golden_model("llama-tiny")
    decoders = [make_decoder(loaded, Configuration(method, POLICY, "eager")) for _ in range(2)]
    before = [set(vars(module)) for module in loaded.model.modules()], set(vars(decoders[0])), dict(vars(attention))
    tokens = torch.from_numpy(golden_tokens[:40]).split(1)
    with torch.inference_mode():
        with _ranges(loaded, decoders[0], "eager"):
            marked = [decoders[0].feed(token) for token in tokens]
        for token, logits in zip(tokens, marked, strict=True):
            assert torch.equal(decoders[1].feed(token), logits)
    after = [set(vars(module)) for module in loaded.model.modules()], set(vars(decoders[0])), dict(vars(attention))
    assert after == before
    cache = getattr(decoders[0], "cache", None)
    assert cache is None or not {"begin", "evict", "attend", "position_ids"} & set(vars(cache))


@pytest.mark.parametrize(("method", "backend"), [("ours", "auto"), ("ring", "eager"), ("recompute", "auto")])
def test_a_profile_adds_up(method, backend, golden_model, golden_tokens):
    loaded = golden_model("neox-tiny")
    policy = EvictionPolicy(n_sink=2, window_size=30, compress_every=8)
    found = profile_decoding(loaded, Configuration(method, policy, backend), golden_tokens)
    assert found.tokens % found.cycle == 0 and found.cycle == (1 if method == "recompute" else 8)
    assert set(found.parts_ms) == {ATTENTION, MLP, ENDS, OTHER} | ({CACHE} if method != "recompute" else set())
    assert min(found.parts_ms.values()) > 0
    assert found.forward_ms + found.update_ms + found.idle_ms == pytest.approx(found.profiled_ms)
    calls = {kernel.name: kernel.calls_per_token for kernel in found.kernels}
    linears = sum(isinstance(module, torch.nn.Linear) for module in loaded.model.modules())
    assert calls["aten::linear"] == linears
    layers = loaded.model.config.num_hidden_layers
    assert calls.get("aten::scaled_dot_product_attention", 0) == (layers if backend == "auto" else 0)
    assert calls.get("aten::softmax", 0) == (0 if backend == "auto" else layers)
    operators = sum(kernel.ms_per_token for kernel in found.kernels)
    assert operators == pytest.approx(sum(found.parts_ms.values()), rel=0.02), "the table is the parts, otherwise cut"


@pytest.mark.parametrize(
    ("backend", "kernel"), [("auto", "aten::scaled_dot_product_attention"), ("eager", "aten::softmax")]
)
def test_a_cache_is_not_its_kernel(backend, kernel, golden_model, golden_tokens):
    loaded = golden_model("neox-tiny")
    decoder = make_decoder(loaded, Configuration("ours", POLICY, backend))
    tokens = torch.from_numpy(golden_tokens[:40]).split(1)
    with torch.inference_mode(), _ranges(loaded, decoder, "eager"), _profiler(loaded.device) as profiler:
        for token in tokens:
            decoder.feed(token)
    parts = {(event.name, _part(event, OTHER)) for event in profiler.events()}
    assert {part for name, part in parts if name == kernel} == {ATTENTION}
    assert ("aten::cat", CACHE) in parts and ("aten::addmm", MLP) in parts and ("aten::embedding", ENDS) in parts


def test_too_long_a_cycle(golden_model, golden_tokens):
    policy = EvictionPolicy(n_sink=2, window_size=30, compress_every=600)
    with pytest.raises(UsageError, match="600 tokens from prune to prune, at most 512"):
        profile_decoding(golden_model("neox-tiny"), Configuration("ours", policy), golden_tokens)


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    profile.add_arguments(parser)
    return parser.parse_args(
        ["--model", str(GOLDEN / "neox-tiny"), "--token-ids", str(GOLDEN / "tokens.json"), *arguments]
    )


def test_the_command(tmp_path, capsys):
    file = tmp_path / "results" / "p.json"
    policy = ("--n-sink", "2", "--window-size", "30", "--threads", "1", "--dtype", "float32")
    arguments = parsed(*policy, "--intervals", "4", "--output-file", str(file), "--json")
    assert profile.run(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads(file.read_text()) == result
    assert [(row["compress_every"], row["tokens"]) for row in result["intervals"]] == [(1, 1), (4, 4)]
    for row in result["intervals"]:
        assert row["update_percent"] == pytest.approx(100 * row["update_ms"] / (row["update_ms"] + row["forward_ms"]))
    assert sum(result["parts_ms"].values()) == pytest.approx(result["profiled_ms"])
    with gzip.open(result["trace"], "rt") as trace:
        names = {event.get("name") for event in json.load(trace)["traceEvents"]}
    assert {"streamllm: attention", "streamllm: cache update", "aten::linear"} <= names
    shown = profile._report(result, file)
    assert "prune interval" in shown and "idle (Python)" in shown


def test_the_kernel_that_ran_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    policy = ("--n-sink", "2", "--window-size", "30", "--threads", "1", "--dtype", "float32")
    assert profile.run(parsed(*policy, "--intervals", "--attn-backend", "math", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["backend"], result["backend_requested"]) == ("math", "math")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--output-file", "p.txt"), "output_file 'p.txt': must end in .json"),
        (("--intervals", "4", "0"), "intervals 4 0: whole numbers >= 1"),
        (("--method", "ours", "--execution", "compile"), "execution 'compile'"),
    ],
)
def test_what_cannot_be(wrong, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        profile.run(parsed(*wrong))
