import json
import math
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity

from orchestrator import dry_run
from orchestrator.configuration import WorkerSettings
from orchestrator.workers import accelerators, cluster, worker
from orchestrator.workers.device_kinds import built_for, device_kinds
from orchestrator.workers.lease import claim
from orchestrator.workers.messages import Variant, WorkerSetup
from streamllm.commands import backends
from streamllm.engine import attention, block_parallel, device
from streamllm.engine.backends import BACKENDS
from streamllm.engine.device import others
from streamllm.engine.execution import static_step
from streamllm.engine.loading import load_model
from streamllm.errors import UsageError
from streamllm.explain import profiling
from streamllm.measuring import timing

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
    monkeypatch.setattr("streamllm.engine.loading.unverified", lambda _: DOUBT)
    load_model(str(GOLDEN / "llama-tiny"), "float32")
    assert [str(warning.message) for warning in recwarn if warning.category is UserWarning] == [DOUBT]


def test_the_list_of_backends_warns(monkeypatch, capsys):
    monkeypatch.setattr("streamllm.engine.loading.unverified", lambda _: DOUBT)
    model = str(GOLDEN / "llama-tiny")
    backends.run(Namespace(model=model, quantization="none", dtype="float32", head_size=8, json=False))
    assert capsys.readouterr().err == f"warning: {DOUBT}\n"


@pytest.fixture
def setup_of_a_worker():
    return WorkerSetup(str(GOLDEN / "llama-tiny"), Variant("float32", "none"))


def test_a_worker_warns(monkeypatch, setup_of_a_worker):
    monkeypatch.setattr(device, "unverified", lambda _: DOUBT)
    monkeypatch.setattr(worker.Worker, "_claim", lambda self, *of: ["claims ", *of])
    one = worker.Worker(setup_of_a_worker, 1, "")
    one.cores = []
    description = one.load()
    assert description["visible_devices"] == ""
    assert description["warnings"] == ["claims ", DOUBT]


def visible(monkeypatch, **given):
    for name in accelerators.VISIBLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)


def test_a_worker_owns_an_accelerator_of_any_kind(accelerator, monkeypatch):
    accelerator(XPU)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _: SimpleNamespace(uuid="ab-1"))
    visible(monkeypatch, ZE_AFFINITY_MASK="3")
    assert accelerators.own_accelerator(True) == accelerators.Accelerator("3", "ab-1", set())
    accelerator(MPS)
    visible(monkeypatch)
    assert accelerators.own_accelerator(True) == accelerators.Accelerator("", "mps", set())


@pytest.mark.parametrize(("kind", "count"), [(XPU, 4), (torch.device("cuda"), 2)])
def test_a_worker_that_sees_more_than_its_own_accelerator_is_refused(kind, count, accelerator, monkeypatch):
    accelerator(kind, count)
    visible(monkeypatch, CUDA_VISIBLE_DEVICES="3")
    with pytest.raises(UsageError, match=rf"accelerator 3 of .*, but torch sees {count}: .* RAY_EXPERIMENTAL_NOSET"):
        accelerators.own_accelerator(True)


def test_no_setting_of_ray_has_workers_share_the_first(monkeypatch):
    """Of each kind that has a variable: as a worker's process has it once the pool's settings are there."""
    from ray._private.accelerators import get_all_accelerator_managers

    gpus = [manager for manager in get_all_accelerator_managers() if manager.get_resource_name() == "GPU"]
    names = {manager.get_visible_accelerator_ids_env_var() for manager in gpus} & set(accelerators.VISIBLE)
    assert names >= {"CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"}
    for settings, seen in (({}, ""), (accelerators.ONE_EACH, "5")):
        for manager in gpus:
            name = manager.get_visible_accelerator_ids_env_var()
            if name not in names:
                continue
            visible(monkeypatch)
            monkeypatch.setenv(f"RAY_EXPERIMENTAL_NOSET_{name}", "1")
            for setting, value in settings.items():
                monkeypatch.setenv(setting, value)
            manager.set_current_process_visible_accelerator_ids(["5"])
            assert accelerators.visible_devices() == seen, name


def test_accelerators_that_ray_does_not_see_are_refused(accelerator):
    assert accelerators.own_accelerator(False) is None
    accelerator(torch.device("cuda"), 2)
    with pytest.raises(UsageError, match=r"torch sees 2 x cuda on .*, Ray sees none: .* start Ray with --num-gpus 2"):
        accelerators.own_accelerator(False)


OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading"


@pytest.mark.parametrize(
    ("built_for", "raised", "reason"),
    [
        (None, None, "it was built for CPUs alone"),
        (torch.device("cuda"), RuntimeError(OLD), "The NVIDIA driver on your system is too old (found version 11040)"),
        (torch.device("cuda"), None, "it was built for cuda and finds none"),
        (MPS, None, "it was built for mps and finds none"),
    ],
)
def test_accelerators_that_torch_cannot_use_are_refused(built_for, raised, reason, monkeypatch):
    def init():
        if raised is not None:
            raise raised

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: built_for)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "init", init)
    visible(monkeypatch, CUDA_VISIBLE_DEVICES="GPU-51ab")
    with pytest.raises(UsageError) as error:
        accelerators.own_accelerator(True)
    message = str(error.value)
    assert message.startswith("Ray gave a worker accelerator GPU-51ab of ")
    assert f"but torch {torch.__version__} there can use none: {reason}; install a torch" in message


def test_one_gpu_is_claimed_once_under_whatever_name(accelerator, monkeypatch, tmp_path, setup_of_a_worker):
    """By its number, and by its name."""
    accelerator(torch.device("cuda"))
    monkeypatch.setenv("STREAMLLM_LEASES", str(tmp_path))
    monkeypatch.setattr(worker, "_pin", lambda _: None)
    monkeypatch.setattr(worker, "claim", partial(claim, patience=0.0))
    monkeypatch.setattr(worker.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    gpus = {"0": "51ab", "GPU-51ab": "51ab", "1": "77cd"}
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda _: SimpleNamespace(uuid=gpus[accelerators.visible_devices()]),
    )
    kept, said = [], []
    for name in gpus:
        visible(monkeypatch, CUDA_VISIBLE_DEVICES=name)
        own = accelerators.own_accelerator(True)
        kept.append(worker.Worker(setup_of_a_worker, 1, f"sweep on {name}", True))
        said.append(kept[-1]._claim(own.name, own.near))
    assert said == [[], ["accelerator-51ab: also used by sweep on 0"], []]


@pytest.mark.parametrize(
    ("place", "listed", "near"),
    [
        ((0, 0x3B, 0), "2-3,6-7\n", [2, 3]),
        ((0x10, 0xDC, 1), "4\n", [4, 0]),
        ((0, 0, 0), "", [0, 1]),
        (None, "6-7", [0, 1]),
    ],
)
def test_the_cores_near_a_gpu_are_claimed_first(place, listed, near, monkeypatch, tmp_path, setup_of_a_worker):
    properties = SimpleNamespace(uuid="51ab")
    if place is not None:
        properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id = place
        folder = tmp_path / "pci" / "{:04x}:{:02x}:{:02x}.0".format(*place)
        folder.mkdir(parents=True)
        (folder / "local_cpulist").write_text(listed)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setenv("STREAMLLM_LEASES", str(tmp_path))
    monkeypatch.setattr(worker.os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4}, raising=False)
    pinned = []
    monkeypatch.setattr(worker, "_pin", pinned.append)
    one = worker.Worker(setup_of_a_worker, 2, "me", True)
    one._claim("51ab", device.near_cores(torch.device("cuda"), tmp_path / "pci"))
    assert pinned == [sorted(near)]


@pytest.mark.parametrize(("kind", "told"), [(MPS, 2), (XPU, 2), (torch.device("cuda"), None)])
def test_ray_is_told_of_accelerators_that_it_may_not_know(kind, told, accelerator, monkeypatch):
    accelerator(kind, 2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    given = {}
    monkeypatch.setattr("ray.init", lambda **options: given.update(options))
    monkeypatch.setattr(cluster, "_vital", lambda ray: {})
    cluster.Cluster.join(None)
    assert given.get("num_gpus") == told
    given.clear()
    cluster.Cluster.join("10.0.0.1:6379")
    assert "num_gpus" not in given, "a cluster knows its own"


def test_a_dry_run_names_the_accelerators(accelerator, monkeypatch):
    accelerator(XPU, 2)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda _: "Arc B580")
    assert dry_run._layout(WorkerSettings()).words == "2, each with one of 2 x Arc B580"


@pytest.mark.parametrize(("kind", "told"), [(torch.device("cuda"), "cuda"), (MPS, "mps"), (None, "cpu")])
def test_kinds_of_device(kind, told, accelerator, monkeypatch):
    accelerator(kind)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert device_kinds(None) == {told} == {built_for()}


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


class FakeEvent:
    """Of a device on which whatever lies between two events takes 1.5 ms."""

    def __init__(self, device, enable_timing):
        assert device == XPU and enable_timing

    def record(self):
        pass

    def elapsed_time(self, end):
        return 1.5


def test_time_in_attention_is_taken_by_the_accelerator(monkeypatch):
    monkeypatch.setattr(torch, "Event", FakeEvent)
    spans = timing._Spans(XPU, profiled=False)
    for _ in range(2):
        with spans.span():
            pass
    assert spans.milliseconds() == [1.5, 1.5]


def test_work_is_timed_by_the_accelerators_own_clock(monkeypatch):
    done = []
    monkeypatch.setattr(torch, "Event", FakeEvent)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda of: done.append("waited"))
    assert device.seconds_of(lambda: done.append("worked"), XPU) == 1.5e-3
    assert done == ["waited", "worked", "waited"]


@pytest.mark.parametrize(("free", "block"), [(80e9, 2048), (2e9, 128), (8e9, 512), (1e6, 128)])
def test_blocks_are_as_large_as_an_accelerators_memory_allows(free, block, golden_model, monkeypatch):
    """By a vocabulary of 50,304."""
    monkeypatch.setattr(block_parallel, "free_memory", lambda of: int(free))
    monkeypatch.setattr(type(golden_model("llama-tiny")), "vocabulary", 50304)
    assert block_parallel.default_block(replace(golden_model("llama-tiny"), device=XPU)) == block
    assert block_parallel.default_block(golden_model("llama-tiny")) == 256


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
