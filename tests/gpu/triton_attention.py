"""The Triton kernel for one query on a GPU: is it right, and how fast is it beside torch's own kernels?

python -m tests.gpu.triton_attention [--json FILE] [--seconds 60]

Right: against float64, over heads, sizes, lengths, masks and dtypes, replayed as a CUDA graph and compiled. Fast:
microseconds a call from CUDA graphs that go through several sets of keys, so that the L2 cache holds none of them.
Every case stands alone, and the file is rewritten after each: what was measured survives whatever comes after.
Needs torch, triton and numpy.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from streamllm.engine.attention import attention, eager_attention
from streamllm.engine.backends import BACKENDS

FLUSHED = 200e6
"""Bytes of keys and values that a graph goes through: four times the L2 cache of an H100."""
REPLAYS = 15
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of an error, as a share of the largest output."""
MASKS = ("none", "ring", "random", "split hidden")


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    size: int
    held: int

    @property
    def name(self) -> str:
        return f"{self.heads}/{self.kv_heads} x {self.size}, {self.held} keys"

    @property
    def bytes(self) -> int:
        """Of the keys and values in 16 bits."""
        return 2 * self.kv_heads * self.held * self.size * 2


TIMED = [Shape(*heads, held) for heads in ((32, 32, 80), (32, 8, 128)) for held in (2048, 8192)]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    shapes = (shape.heads, 1), (shape.kv_heads, shape.held), (shape.kv_heads, shape.held)
    query, key, value = (
        torch.randn(1, *s, shape.size, generator=generator, device=device, dtype=torch.float32).to(dtype)
        for s in shapes
    )
    return query, key, value


def mask_of(kind: str, held: int, device: torch.device) -> Tensor | None:
    """(1, held), True where visible; the last key always is."""
    mask = torch.ones(1, held, dtype=torch.bool)
    if kind == "none":
        return None
    if kind == "ring":  # the oldest of the window are evicted, somewhere in the middle
        mask[:, held // 2 : held // 2 + min(63, held // 3)] = False
    elif kind == "random":
        mask = torch.rand(1, held, generator=torch.Generator().manual_seed(0)) < 0.5
    else:
        mask[:, : held // 2] = False
    mask[:, -1] = True
    return mask.to(device)


class Report:
    """What was found so far, in a file."""

    def __init__(self, path: Path | None, seconds: float) -> None:
        self.path = path
        self.started = time.monotonic()
        self.seconds = seconds
        self.found: dict[str, Any] = {"cases": []}

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def run(self, what: str, case: dict[str, Any], measure: Callable[[], dict[str, Any]], until: float = 1.0) -> None:
        """Adds `case` with what `measure` returns, or how it failed; skipped after that share of the time."""
        if self.elapsed > until * self.seconds:
            entry = {"what": what, **case, "skipped": "out of time"}
        else:
            try:
                entry = {"what": what, **case, **measure()}
            except Exception as failure:  # one case less, the others go on
                entry = {"what": what, **case, "error": f"{type(failure).__name__}: {str(failure)[:300]}"}
        self.found["cases"].append(entry)
        if "error" in entry:
            print(f"{what} {case}: {entry['error']}", flush=True)
        self.flush()

    def flush(self) -> None:
        self.found["seconds"] = round(self.elapsed, 1)
        if self.path is not None:
            written = self.path.with_suffix(".part")
            written.write_text(json.dumps(self.found, indent=1))
            written.replace(self.path)

    def of(self, what: str) -> list[dict[str, Any]]:
        return [case for case in self.found["cases"] if case["what"] == what]


def microseconds(call: Callable[[int], Tensor], sets: int, device: torch.device) -> float:
    """Of one `call(set)`: the median over replays of a graph of one call per set."""
    if device.type == "cpu":  # a rehearsal
        started = time.perf_counter()
        call(0)
        return 1e6 * (time.perf_counter() - started)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(sets):
            call(index)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    graph.replay()
    for mark in marks[:-1]:
        mark.record()
        graph.replay()
    marks[-1].record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    return 1e3 * float(np.median(times)) / sets


def speed_of(shape: Shape, call: Callable[[int], Tensor], sets: int, device: torch.device) -> dict[str, Any]:
    us = microseconds(call, sets, device)
    return {"us": round(us, 2), "GB/s": round(shape.bytes / us / 1e3)}


def judged(
    found: Tensor, mask: Tensor | None, scaling: float, query: Tensor, key: Tensor, value: Tensor
) -> dict[str, Any]:
    expected = eager_attention(query.double(), key.double(), value.double(), scaling, mask)
    error = ((found.double() - expected).abs().max() / expected.abs().max()).item()
    return {"error": error, "right": error < TOLERANCE[query.dtype]}


def check_correctness(
    report: Report, device: torch.device, shapes: Iterable[Shape], dtypes: Iterable[torch.dtype]
) -> None:
    from streamllm.engine.triton_attention import decode_attention

    for shape, dtype in itertools.product(shapes, dtypes):
        query, key, value = inputs(shape, dtype, device)
        for kind in MASKS:

            def measure(
                kind: str = kind, query: Tensor = query, key: Tensor = key, value: Tensor = value
            ) -> dict[str, Any]:
                mask, scaling = mask_of(kind, key.shape[2], device), key.shape[3] ** -0.5
                found = decode_attention(query, key, value, mask, scaling)
                return judged(found, mask, scaling, query, key, value)

            case = {"shape": shape.name, "dtype": str(dtype).removeprefix("torch."), "mask": kind}
            report.run("correctness", case, measure, until=0.75)


def check_uses(report: Report, device: torch.device) -> None:
    """A graph replayed after its inputs changed; a compiled call; keys that are views; a batch of two."""
    from streamllm.engine.triton_attention import decode_attention

    shape, scaling = Shape(32, 8, 128, 515), 0.1
    # The interpreter's products of matrices in bfloat16 are wrong.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = inputs(shape, dtype, device)
    mask = mask_of("random", shape.held, device)
    assert mask is not None

    def graph() -> dict[str, Any]:
        decode_attention(query, key, value, mask, scaling)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            found = decode_attention(query, key, value, mask, scaling)
        mask.logical_not_()
        key.mul_(0.5)
        captured.replay()
        return judged(found, mask, scaling, query, key, value)

    def views() -> dict[str, Any]:
        wide = [x.transpose(1, 2).contiguous().transpose(1, 2)[:, :, 3:] for x in (key, value)]
        return judged(decode_attention(query, *wide, None, scaling), None, scaling, query, *wide)

    def batch() -> dict[str, Any]:
        two = [torch.cat((x, x.flip(1))) for x in (query, key, value)]
        return judged(decode_attention(*two, mask, scaling), mask, scaling, *two)

    def compiled() -> dict[str, Any]:
        def step(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
            key.mul_(1.0)  # as a ring writes its slot
            return attention(BACKENDS["triton"], query, key, value, scaling, mask)

        started = time.monotonic()
        with torch.inference_mode():
            found = torch.compile(step, fullgraph=True, dynamic=False)(query, key, value, mask)
        return judged(found, mask, scaling, query, key, value) | {"seconds": round(time.monotonic() - started, 1)}

    def host() -> dict[str, Any]:
        """Python's share of an eager call, which a GPU waits for where its kernel is shorter."""
        result, calls = {}, 200 if device.type == "cuda" else 1
        kernels = {
            "triton": lambda: decode_attention(query, key, value, mask, scaling),
            "sdpa": lambda: scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True),
        }
        with torch.inference_mode():
            for name, call in kernels.items():
                call()
                started = time.perf_counter()
                for _ in range(calls):
                    call()
                result[name] = round((time.perf_counter() - started) / calls * 1e6, 1)
        return {"host us": result}

    for measure in (graph, views, batch, host, compiled):
        report.run("use", {"use": measure.__name__}, measure, until=1.2)


def time_kernels(report: Report, device: torch.device, shape: Shape) -> None:
    """torch's kernels, ours as configured, then ours cut in other ways."""
    from streamllm.engine.triton_attention import flash_decoding

    sets = max(4, round(FLUSHED / shape.bytes)) if device.type == "cuda" else 1
    held = [inputs(shape, torch.bfloat16, device, seed) for seed in range(sets)]
    ring, scaling, grouped = mask_of("ring", shape.held, device), shape.size**-0.5, shape.heads != shape.kv_heads

    def sdpa(name: str, mask: Tensor | None) -> dict[str, Any]:
        def call(index: int) -> Tensor:
            return scaled_dot_product_attention(*held[index], mask, scale=scaling, enable_gqa=grouped)

        with BACKENDS[name].active():
            return speed_of(shape, call, sets, device)

    def ours(mask: Tensor | None, config: Any = None) -> dict[str, Any]:
        return speed_of(shape, lambda index: flash_decoding(*held[index], mask, scaling, config), sets, device)

    for name, mask in (("flash", None), ("efficient", ring), ("math", ring), ("cudnn", ring), ("auto", ring)):
        case = {"shape": shape.name, "kernel": name, "masked": mask is not None}
        report.run("speed", case, partial(sdpa, name, mask), until=0.6)
    for mask in (None, ring):
        case = {"shape": shape.name, "kernel": "triton", "masked": mask is not None}
        report.run("speed", case, partial(ours, mask), until=0.8)
    for config in configurations(device):
        case = {"shape": shape.name, **config._asdict()}
        report.run("configuration", case, partial(ours, ring, config), until=0.7)


def configurations(device: torch.device) -> list[Any]:
    """Larger blocks of fewer warps do not fit into registers."""
    from streamllm.engine.triton_attention import Cut

    if device.type == "cpu":
        return [Cut(32, 4, 1, 4)]
    cuts = itertools.product((16, 32, 64, 128), (2, 4, 8), (1, 2, 3), (2, 4, 8, 16))
    return [Cut(*cut) for cut in cuts if 4 <= cut[0] / cut[1] <= 16]


def build_beforehand(device: torch.device, jobs: Iterable[tuple[Shape, torch.dtype, Any]]) -> dict[str, Any]:
    """Compiles in threads what the cases will call: most of a compilation is outside of Python."""
    from streamllm.engine.triton_attention import flash_decoding

    def build(job: tuple[Shape, torch.dtype, Any]) -> None:
        shape, dtype, config = job
        for kind in ("ring", "none") if config is None else ("ring",):
            flash_decoding(*inputs(shape, dtype, device), mask_of(kind, shape.held, device), 0.1, config)

    started, failed = time.monotonic(), 0
    with ThreadPoolExecutor(16 if device.type == "cuda" else 1) as pool:  # the interpreter is not for several threads
        for future in [pool.submit(build, job) for job in jobs]:
            try:
                future.result()
            except Exception as failure:  # its case will say so
                failed += 1
                print(f"built beforehand: {type(failure).__name__}: {str(failure)[:200]}", flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {"seconds": round(time.monotonic() - started, 1), "failed": failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write what was found, after every case")
    parser.add_argument("--seconds", type=float, default=60, help="start no more cases after about so long (60)")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(options.json, options.seconds)
    report.found["torch"] = torch.__version__
    report.found["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    report.flush()

    import triton

    report.found["triton"] = triton.__version__
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    if device.type == "cpu":
        timed, checked = [Shape(4, 4, 16, 70), Shape(4, 2, 16, 70)], [Shape(4, 4, 16, 7), Shape(8, 2, 16, 65)]
        dtypes = [torch.float32]
    else:
        timed = TIMED
        checked = [
            Shape(*heads, size, held)
            for size, heads, held in itertools.product(
                (80, 128, 64, 16), ((4, 4), (32, 32), (8, 2), (32, 8)), (1, 7, 64, 257, 2048)
            )
        ]
    # The cheapest to know first: whether it runs at all.
    first = [Shape(4, 4, 80, 257), Shape(8, 2, 128, 257)] if device.type == "cuda" else checked[:1]
    check_correctness(report, device, first, dtypes[:1])
    # The number of programs and keys is not compiled into anything.
    kinds = {(shape.heads, shape.kv_heads, shape.size): shape for shape in timed}.values()
    jobs: list[Any] = [(shape, torch.bfloat16, None) for shape in kinds]
    for shape in kinds:
        configs = {config._replace(programs=4): None for config in configurations(device)}
        jobs += [(shape, torch.bfloat16, config) for config in configs]
    report.run("build", {"of": "configurations"}, partial(build_beforehand, device, jobs))
    for shape in timed:
        time_kernels(report, device, shape)
    # The size and the group decide what is compiled.
    jobs = [(shape, dtype, None) for shape in checked if shape.held == 7 and shape.heads < 32 for dtype in dtypes]
    report.run("build", {"of": "correctness"}, partial(build_beforehand, device, jobs), until=0.7)
    check_correctness(report, device, checked, dtypes)
    check_uses(report, device)
    summarize(report)


def summarize(report: Report) -> None:
    checks = report.of("correctness") + report.of("use")
    done = [case for case in checks if "right" in case]
    wrong = [case for case in done if not case["right"]]
    print(f"\n{report.found['device']}, {report.elapsed:.0f} s")
    print(f"right: {len(done) - len(wrong)} of {len(done)}; not run: {sum('skipped' in case for case in checks)}")
    for case in wrong:
        print("WRONG", case)
    for case in report.of("use"):
        print(case)
    for case in report.of("speed"):
        masked = "masked" if case["masked"] else "unmasked"
        rate = f"{case['us']:8.1f} us {case['GB/s']:6} GB/s" if "us" in case else case.get("error", "not run")[:60]
        print(f"{case['shape']:28}{case['kernel']:10}{masked:10}{rate}")
    timed = [case for case in report.of("configuration") if "us" in case]
    for shape in dict.fromkeys(case["shape"] for case in timed):
        best = sorted((case for case in timed if case["shape"] == shape), key=lambda case: case["us"])[:4]
        for case in best:
            cut = ", ".join(f"{name} {case[name]}" for name in ("block", "warps", "stages", "programs"))
            print(f"{shape:28}{'masked':10}{case['us']:8.1f} us {case['GB/s']:6} GB/s  {cut}")


if __name__ == "__main__":
    main()
