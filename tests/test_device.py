import json
import math
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity

from orchestrator import dry_run, pool, worker
from orchestrator.trial import WorkerSetup
from streamllm import attention, device, profiling, timing
from streamllm.backends import BACKENDS
from streamllm.commands import backends
from streamllm.device import others
from streamllm.errors import UsageError
from streamllm.execution import static_step
from streamllm.models import load_model
from streamllm.text import TextSource

from .conftest import GOLDEN

GPU = "GPU-51ab"
ANSWER = "GPU-51ab, 100, python\nGPU-77cd, 200, python\nGPU-51ab, 300, /usr/bin/train, on\n"
MPS, XPU = torch.device("mps"), torch.device("xpu")
DOUBT = "mps: never tried by us, its times and kernels are unverified"


@pytest.fixture
def accelerator(monkeypatch):
    """Has torch say that the accelerators of this machine are so many of that kind."""

    def pretend(kind: torch.device, count: int = 1) -> None:
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: kind)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)

    remembering = (device._counts_memory, device.device_name, device.float64_device)
    for function in remembering:
        function.cache_clear()
    yield pretend
    for function in remembering:
        function.cache_clear()


@pytest.mark.parametrize(
    ("answer", "own", "foreign"),
    [
        (ANSWER, 100, ["300 /usr/bin/train, on"]),
        ("GPU-51ab, 100, python\n", 100, []),
        ("", 100, []),
        ("GPU-51ab, 4711, [Not Found]\n", 100, []),  # a container: ours, under the host's number
        (ANSWER, 1, ["1 of 100 python, 300 /usr/bin/train, on"]),
        ("GPU-77cd, 200, python\n", 100, []),
    ],
)
def test_who_else_computes_on_the_accelerator(answer, own, foreign):
    assert others(answer, GPU, own) == foreign


def test_the_engine_on_an_accelerator_of_another_kind_and_without_float64():
    script = [sys.executable, "-m", "tests.elsewhere"]
    run = subprocess.run(script, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found.pop("errors") == dict.fromkeys(("ours", "mit", "ring", "recompute", "block-parallel", "windows"), 0.0)
    assert found.pop("refused") == [
        "execution 'compile': elsewhere has no float64, which a step computes its angles in; use eager",
        "execution 'cudagraph': needs a CUDA device, the model is on elsewhere; use compile or eager",
    ]
    assert found == {
        "device": "elsewhere",
        "default": "elsewhere",
        "float64": "cpu",
        "warning": "elsewhere: never tried by us, its times and kernels are unverified",
        "dtypes": ["float64"],
    }


@pytest.mark.parametrize(
    ("kind", "hip", "doubted"),
    [("cpu", None, None), ("cuda", None, None), ("cuda", "7.1", "rocm"), ("xpu", None, "xpu")],
)
def test_what_was_never_tried_is_doubted(kind, hip, doubted, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    doubt = device.unverified(torch.device(kind))
    assert doubt == (doubted and f"{doubted}: never tried by us, its times and kernels are unverified")


@pytest.mark.parametrize("kind", [MPS, XPU, torch.device("cuda")])
def test_the_accelerator_is_the_default(kind, accelerator):
    accelerator(kind)
    assert device.default_device() == kind


def test_without_an_accelerator_the_default_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert device.default_device() == torch.device("cpu")


def test_a_load_warns_once(monkeypatch, recwarn):
    monkeypatch.setattr("streamllm.models.unverified", lambda _: DOUBT)
    load_model(str(GOLDEN / "llama-tiny"), "float32")
    assert [str(warning.message) for warning in recwarn if warning.category is UserWarning] == [DOUBT]


def test_the_list_of_backends_warns(monkeypatch, capsys):
    monkeypatch.setattr(device, "unverified", lambda _: DOUBT)
    backends.run(Namespace(dtype="float32", head_size=8, json=False))
    assert capsys.readouterr().err == f"warning: {DOUBT}\n"


def test_a_worker_warns(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "unverified", lambda _: DOUBT)
    monkeypatch.setattr(worker.Worker, "_claim", lambda self, visible: [f"claims {visible}"])
    for name in worker._VISIBLE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ZE_AFFINITY_MASK", "3")
    text = tmp_path / "text.json"
    text.write_text(json.dumps(list(range(50))))
    source = TextSource(token_ids=text)
    one = worker.Worker(WorkerSetup(str(GOLDEN / "llama-tiny"), source, "float32", "none", tmp_path, 48), 1, "")
    one.cores = []
    description = one.load()
    assert description["visible_devices"] == "3"
    assert description["warnings"] == ["claims 3", "was given accelerator 3, torch sees 0", DOUBT]


def test_a_worker_sees_its_own_accelerator_of_any_kind(accelerator):
    accelerator(XPU)
    assert worker._mismatches([], "3") == []
    accelerator(XPU, 4)
    assert worker._mismatches([], "3") == ["was given accelerator 3, torch sees 4"]


@pytest.mark.parametrize(("kind", "told"), [(MPS, 2), (XPU, 2), (torch.device("cuda"), None)])
def test_ray_is_told_of_accelerators_that_it_may_not_know(kind, told, accelerator, monkeypatch):
    accelerator(kind, 2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    given = {}
    monkeypatch.setattr("ray.init", lambda **options: given.update(options))
    pool._init_ray(None)
    assert given.get("num_gpus") == told
    given.clear()
    pool._init_ray("10.0.0.1:6379")
    assert "num_gpus" not in given, "a cluster knows its own"


def test_a_dry_run_names_the_accelerators(accelerator, monkeypatch):
    accelerator(XPU, 2)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda _: "Arc B580")
    assert dry_run._layout(0, 0, None).words == "2, each with one of 2 x Arc B580"


def test_names(accelerator):
    assert device.device_name(MPS) == f"mps of {device.device_name(torch.device('cpu'))}"


def test_dtypes(accelerator, monkeypatch):
    for able, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda including_emulation, able=able: able)
        assert device.resolve_dtype("auto", XPU) == dtype
    assert device.resolve_dtype("auto", MPS) == torch.float16
    assert device.resolve_dtype("float64", torch.device("cpu")) == torch.float64
    with pytest.raises(UsageError, match=r"dtype 'float64': mps does not compute in it; give float32"):
        device.resolve_dtype("float64", MPS)


def test_waiting_and_giving_memory_back(accelerator, monkeypatch):
    called = []
    monkeypatch.setattr(torch.accelerator, "synchronize", called.append)
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: called.append("emptied"))
    accelerator(MPS)
    device.synchronize(torch.device("cpu"))
    device.synchronize(MPS)
    device.empty_cache()
    assert called == [MPS, "emptied"]


def test_memory_of_any_accelerator(accelerator, monkeypatch):
    called = []
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda _: 3 * 2**20)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda _: 5 * 2**20)
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", called.append)
    with device.peak_memory(XPU) as memory:
        assert called == [XPU]
    assert (device.used_memory(XPU), memory.megabytes) == (3, 5)


def test_memory_that_torch_does_not_count_is_not_made_up(accelerator, monkeypatch):
    def refuse(*_):
        raise RuntimeError("Allocator for mps is not a DeviceAllocator.")

    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.accelerator, name, refuse)
    with device.peak_memory(MPS) as memory:
        pass
    assert math.isnan(device.used_memory(MPS)) and math.isnan(memory.megabytes)


def test_time_in_attention_is_taken_by_the_accelerator(monkeypatch):
    class Event:
        def __init__(self, device, enable_timing):
            assert device == XPU and enable_timing

        def record(self):
            pass

        def elapsed_time(self, end):
            return 1.5

    monkeypatch.setattr(torch, "Event", Event)
    spans = timing._Spans(XPU, profiled=False)
    for _ in range(2):
        with spans.span():
            pass
    assert spans.milliseconds() == [1.5, 1.5]


def test_executions_that_the_device_does_not_have_are_refused(golden_model, accelerator):
    loaded = replace(golden_model("llama-tiny"), device=MPS)
    for execution, reason in (("compile", "mps has no float64"), ("cudagraph", "needs a CUDA device")):
        with pytest.raises(UsageError, match=f"execution '{execution}': {reason}"):
            static_step(execution, lambda *_: torch.empty(0), loaded, None)


def test_a_profile_without_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(timing, "supported_activities", lambda: {ProfilerActivity.CPU})
    with pytest.raises(UsageError, match="does not see the kernels of mps"):
        profiling._profiler(MPS)
    profiling._profiler(torch.device("cpu"))


@pytest.mark.parametrize(
    ("operator", "kernel"),
    [
        ("aten::_scaled_dot_product_attention_math_for_mps", "mps"),
        ("aten::_scaled_dot_product_fused_attention_overrideable", "overrideable"),
    ],
)
def test_kernels_of_other_accelerators_have_their_own_names(operator, kernel):
    recorder = attention.KernelRecorder(BACKENDS["math"])

    def ran() -> None:
        pass

    ran._schema = SimpleNamespace(name=operator)
    recorder.__torch_dispatch__(ran, ())
    assert recorder.used == kernel
