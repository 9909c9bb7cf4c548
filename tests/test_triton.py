"""The Triton kernel without a GPU: interpreted on CPU tensors, and compiled for GPUs that are not there.

tests/gpu/triton_attention.py is for one that is.
"""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from streamllm.engine.backends import BACKENDS
from streamllm.engine.probing import probe_backend

installed = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
not_interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"
)


@functools.cache
def interpreted(*group):
    """What tests/interpreted_triton.py found: {case: outcome}."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.interpreted_triton", *group],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this Triton's interpreter does not know this numpy (3.6 and 2.4, say)")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@installed
def test_the_kernel_is_attention_in_float64():
    tolerance = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
    found = interpreted("kernel")
    assert len(found) > 30
    wrong = {case: error for case, error in found.items() if not error < tolerance[case.split(", ")[-1]]}
    assert not wrong


@installed
def test_batches_views_and_large_scores():
    found = interpreted("layouts")
    assert len(found) == 8
    # Large logits, of some hundred, are themselves rounded to 1e-5.
    assert not {case: error for case, error in found.items() if not error < (1e-5 if "large" in case else 3e-6)}


@installed
def test_as_an_operator():
    found = interpreted("operator")
    assert found["compiled, masked"] < 2e-6 and found["compiled, unmasked"] < 2e-6
    assert found["recorded"] == ["triton", "flash"], "several tokens at once are torch's"
    kernel, available, *refused = found["probed"]
    assert (kernel, available) == ("triton", True)
    assert "float64" in refused[0] and "multiple of 16, not of 24" in refused[1]


@installed
@pytest.mark.parametrize("family", ["neox-tiny", "llama-tiny"])
@pytest.mark.parametrize("every", [1, 8])
@pytest.mark.parametrize("backend", ["triton", "ring_triton"])
def test_golden_losses_through_the_ring(family, every, backend):
    kernel, difference = interpreted("golden", backend)[f"{family} R={every}"]
    assert kernel == backend
    assert difference < {"neox-tiny": 2e-4, "llama-tiny": 1e-3}[family]


@installed
def test_a_rings_step_is_attention_in_float64():
    tolerance = {"float32": 2e-6, "float16": 1e-3}
    found = interpreted("ring")
    assert len(found) == 28
    assert not {case: error for case, error in found.items() if not error < tolerance[case.split(", ")[-1]]}


@installed
def test_a_rings_step_is_the_rings_eager_and_compiled():
    found = interpreted("ways")
    assert len(found) == 8
    # What is kept in float16 may be rounded to the next number, where what is computed differs by a rounding.
    tolerance = {case: 1e-3 if "float16" in case else 1e-5 for case in found}
    assert not {case: error for case, error in found.items() if not error < tolerance[case]}


@not_interpreted
@pytest.mark.skipif(torch.cuda.is_available(), reason="the model is on a GPU")
def test_on_a_cpu_a_probe_says_what_is_missing():
    probe = probe_backend(BACKENDS["triton"], torch.device("cpu"), torch.float32, 16)
    assert not probe.available
    reason = "Triton compiles for GPUs" if importlib.util.find_spec("triton") else "No module named 'triton'"
    assert reason in probe.error


def compiled(kernel, options, capability, **arguments):
    """A cubin. `arguments` has a type for each that is not a constant; what JIT finds out of pointers and strides, that
    they are multiples of 16, is assumed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: kind if isinstance(kind, str) else "constexpr" for name, kind in arguments.items()}
    constants = {name: value for name, value in arguments.items() if types[name] == "constexpr"}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or name.startswith(("key_", "value_"))
    }
    source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(binary, folder):
    """Registers of a thread and bytes of its stack, which is where registers are spilled."""
    import triton

    file = folder / "kernel.cubin"
    file.write_bytes(binary)
    tool = triton.knobs.nvidia.cuobjdump.path
    shown = subprocess.run([tool, "--dump-resource-usage", str(file)], capture_output=True, text=True, check=True)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", shown.stdout).groups()
    return int(registers), int(stack) + int(local)


@installed
@not_interpreted
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "group", "size"),
    [(d, g, s) for d in ("float16", "bfloat16") for g, s in ((1, 80), (1, 128), (4, 80), (4, 128))]
    + [("float32", 1, 80), ("float32", 4, 128)],
)
def test_compiled_for_a_gpu(capability, dtype, group, size, tmp_path, monkeypatch):
    from streamllm.engine.triton_attention import attend_split, shapes, usual_cut

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = usual_cut(group, getattr(torch, dtype))
    short = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}[dtype]
    strides = {f"{x}_{of}": "i32" for x in ("key", "value") for of in ("batch", "head", "token")}
    for mask in ("*i1", None):
        binary = compiled(
            attend_split,
            {"num_warps": config.warps},
            capability,
            **dict.fromkeys(("query", "key", "value"), f"*{short}"),
            **dict.fromkeys(("outputs", "norms"), "*fp32"),
            **dict.fromkeys(("held", "span", "kv_heads"), "i32"),
            **strides,
            **shapes(group, size, config),
            mask=mask,
            scale="fp32",
        )
        registers, spilled = resources(binary.asm["cubin"], tmp_path)
        print(f"sm_{capability} {dtype} {group} x {size}: {registers} registers, {binary.metadata.shared} bytes shared")
        assert spilled <= (16 if dtype == "float32" else 0)  # a few of a group's in float32, by Triton 3.9
        # Programs of a multiprocessor hide each other's latency: it has 65536 registers, and 163 KiB in an A100.
        assert registers * 32 * config.warps <= 65536 / (2 if dtype == "float32" else 3)
        assert binary.metadata.shared <= (80 if dtype == "float32" else 40) * 1024
        assert re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg", binary.asm["ptx"]), "16 bytes a thread and load"
        assert dtype == "float32" or group == 1 or "mma.sync" in binary.asm["ptx"]
        assert "tf32" not in binary.asm["ptx"]


@installed
@not_interpreted
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "kept", "group", "size", "turned"),
    [
        ("bfloat16", "bfloat16", 1, 80, 20),
        ("bfloat16", "bfloat16", 4, 128, 128),
        ("float16", "float16", 1, 64, 0),
        ("float32", "float32", 4, 64, 64),
        ("float32", "float16", 4, 64, 64),
        ("bfloat16", "float8_e4m3", 4, 128, 128),
        ("bfloat16", "float8_e4m3", 1, 80, 20),
    ],
)
def test_a_rings_step_compiled_for_a_gpu(capability, dtype, kept, group, size, turned, tmp_path, monkeypatch):
    if (capability, kept) == (80, "float8_e4m3"):
        pytest.skip("which reads no float8: there a ring's step is no single launch")
    from streamllm.engine.triton_attention import shapes
    from streamllm.engine.triton_ring import MERGED_SPLITS, ring_cut, ring_step

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = ring_cut(group, getattr(torch, dtype))
    types = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "float8_e4m3": "*fp8e4nv"}
    binary = compiled(
        ring_step,
        {"num_warps": config.warps},
        capability,
        **dict.fromkeys(("query", "new_key", "new_value", "merged"), types[dtype]),
        **dict.fromkeys(("keys", "values"), types[kept]),
        sinks=types[dtype] if turned else None,
        **dict.fromkeys(("cos", "sin"), "*fp32" if turned else None),
        **dict.fromkeys(("position", "evicted"), "*i64"),
        **dict.fromkeys(("outputs", "norms"), "*fp32"),
        finished="*i32",
        scale="fp32",
        **dict.fromkeys(("n_sink", "window", "span", "query_stride", "key_stride", "value_stride"), "i32"),
        turned=turned,
        interleaved=False,
        **shapes(group, size, config),
        merged_splits=MERGED_SPLITS,
    )
    registers, spilled = resources(binary.asm["cubin"], tmp_path)
    print(f"sm_{capability} {dtype} {group} x {size}: {registers} registers, {binary.metadata.shared} bytes shared")
    assert spilled <= 16
    side_by_side = 3 if dtype != "float32" else 2 if kept == dtype else 1  # programs on a multiprocessor, by registers
    assert registers * 32 * config.warps <= 65536 / side_by_side
    assert binary.metadata.shared <= (80 if dtype == "float32" else 40) * 1024
    assert re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg", binary.asm["ptx"]), "16 bytes a thread and load"
    assert re.search(r"atom\S*gpu\S*acq_rel", binary.asm["ptx"]), "whoever merges sees what all others wrote"


@installed
@not_interpreted
@pytest.mark.parametrize("capability", [80, 90])
def test_the_merge_compiled_for_a_gpu(capability, tmp_path, monkeypatch):
    from streamllm.engine.triton_attention import MERGED_COLUMNS, MOST_SPLITS, merge_splits

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    binary = compiled(
        merge_splits,
        {"num_warps": 1},
        capability,
        outputs="*fp32",
        norms="*fp32",
        merged="*bf16",
        splits="i32",
        size=80,
        rows=MOST_SPLITS,
        columns=MERGED_COLUMNS,
    )
    registers, spilled = resources(binary.asm["cubin"], tmp_path)
    print(f"sm_{capability} merge: {registers} registers")
    assert spilled == 0
