"""Which operators are fused: what a profile's operators and inductor's names are told as."""

import json

import pytest

from streamllm.commands import profile
from streamllm.configuration import Configuration
from streamllm.engine.cpu_kernels import has_kernels
from streamllm.errors import UsageError
from streamllm.explain import fusion
from streamllm.explain.fusion import fused_kernels, fusion_of, kind_of, kinds_of, operators_in
from streamllm.explain.profiling import Kernel, Profile, by_operator, profile_decoding
from streamllm.policy import EvictionPolicy

from .test_profile import Event, parsed

POLICY = EvictionPolicy(n_sink=2, window_size=30)
FUSED = "cpp_fused__to_copy_add_gelu_index_copy_native_layer_norm_matmul_1"


def profiled(kernels, launches=3.0):
    listed = [Kernel(name, calls, ms) for name, (calls, ms) in kernels.items()]
    operators = [one for one in listed if one.name.startswith("aten::")]
    return Profile(8, 1, {}, launches, listed, operators, profiled_ms=9.0, tpot_ms=2.0)


EAGER = profiled({"aten::addmm": (24, 4.0), "aten::add": (12, 1.0), "aten::view": (90, 3.0)}, 389.0)
COMPILED = profiled({FUSED: (6, 0.75), "graph_0_cpp_fused_mul_sum_2": (1, 0.25), "aten::fill_": (2, 0.1),
                     "aten::empty": (7, 0.1), "streamllm::matrix_vector": (7, 0.5),
                     "Pregraph bytecode": (1, 1.0)})  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::addmm", fusion.PRODUCTS),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", fusion.ATTENTION),
        ("aten::_softmax", fusion.ATTENTION),
        ("aten::native_layer_norm", fusion.NORMS),
        ("aten::_fused_rms_norm", fusion.NORMS),
        ("aten::add_", fusion.ADDITIONS),
        ("aten::silu", fusion.ACTIVATIONS),
        ("aten::_to_copy", fusion.OTHER),
    ],
)
def test_kinds_of_operators(operator, kind):
    assert kind_of(operator) == kind


def test_names_of_kernels_are_the_operators_in_them():
    expected = ["_to_copy", "add", "gelu", "index_copy", "native_layer_norm", "matmul"]
    (first, second) = fused_kernels(COMPILED.kernels)
    assert (list(first.operators), first.calls_per_token) == (expected, 6)
    assert second.operators == ("mul", "sum")
    assert fused_kernels([Kernel("triton_red_fused_add_native_layer_norm_0", 1, 1.0)])[0].operators == (
        "add", "native_layer_norm",
    )  # fmt: skip
    assert operators_in("novel_add") == ["novel", "add"]
    assert operators_in("gelu_matrix_vector_view") == ["gelu", "matrix_vector", "view"]


def test_shares_and_what_would_be_gained():
    kinds = {kind.name: kind for kind in kinds_of(EAGER)}
    assert next(iter(kinds)) == fusion.PRODUCTS
    assert {name: kind.share for name, kind in kinds.items() if kind.share} == {
        fusion.PRODUCTS: 0.5, fusion.OTHER: 0.375, fusion.ADDITIONS: 0.125,
    }  # fmt: skip
    assert (kinds[fusion.PRODUCTS].most_speedup, kinds[fusion.NORMS].most_speedup) == (2.0, 1.0)
    assert kinds[fusion.ADDITIONS].calls_per_token == 12


def test_operators_of_a_gpu_are_timed_by_their_kernels():
    kernel = type("Kernel", (), {"duration": 7.0})()
    launching = Event("aten::add", 0, 2, self_cpu_time_total=2.0, kernels=[kernel])
    host = Event("aten::view", 2, 3, self_cpu_time_total=1.0)
    assert by_operator([launching, host]) == {"aten::add": (1, 7.0)}
    launching.kernels = []
    assert by_operator([launching, host]) == {"aten::add": (1, 2.0), "aten::view": (1, 1.0)}


def test_a_real_step_has_its_kinds(golden_model, golden_tokens):
    loaded = golden_model("neox-tiny")
    found = profile_decoding(loaded, Configuration("ring", POLICY, "auto"), golden_tokens)
    assert found.operators == [one for one in found.kernels if one.name.startswith("aten::")]
    kinds = {kind.name: kind for kind in kinds_of(found)}
    layers = loaded.model.config.num_hidden_layers
    assert kinds[fusion.ACTIVATIONS].calls_per_token == layers
    assert kinds[fusion.ADDITIONS].calls_per_token >= 2 * layers, "residuals: two a layer"
    assert sum(kind.share for kind in kinds.values()) == pytest.approx(1)


@pytest.fixture
def steps(monkeypatch):
    """The configurations that are profiled; what a compiler makes takes it most of a minute."""
    seen = []

    def profile_of(loaded, what, tokens):
        seen.append((what.execution, what.backend))
        return COMPILED if what.execution == "compile" else EAGER

    monkeypatch.setattr(fusion, "profile_decoding", profile_of)
    return seen


def test_every_execution_is_profiled(steps, golden_model, golden_tokens):
    what = Configuration("ring", POLICY, "math", "compile")
    found = fusion_of(golden_model("neox-tiny"), what, golden_tokens)
    assert steps == [("eager", "eager"), ("eager", "math"), ("compile", "math")]
    assert [(run.execution, run.backend) for run in found.runs] == [
        ("eager", "eager"), ("eager", "math"), ("compile", "math"),
    ]  # fmt: skip
    assert [run.launches_per_token for run in found.runs] == [389, 389, 3]
    assert [run.computing_per_token for run in found.runs] == [126, 126, 16 + 7], "calls of torch's own making are none"
    assert [kernel.name for kernel in found.left] == ["aten::fill_"]
    assert [kernel.name for kernel in found.own] == ["streamllm::matrix_vector"]


def test_the_command(steps, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    what = ("--n-sink", "2", "--window-size", "30", "--threads", "1", "--dtype", "float32")
    assert profile.run(parsed("--fusion", *what)) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "results" / "profile_kernels" / "fusion.json").read_text())
    assert (result["method"], result["execution"], result["backend"]) == (
        "ring",
        "compile",
        "cpp" if has_kernels() else "fused",
    )
    assert result["kinds"][0]["most_speedup"] == 2 and result["fused"][0]["operators"][0] == "_to_copy"
    for line in ("  _to_copy, add, gelu, index_copy, native_layer_norm, matmul", "called one by one still: fill_ 2",
                 f"{'matrix products':30}{24:12}{4.0:10.3f}{0.5:8.0%}{2.0:11.2f}x"):  # fmt: skip
        assert line in shown.splitlines()
    with pytest.raises(UsageError, match="execution 'compile': the steps of method 'ours' change shape"):
        profile.run(parsed("--fusion", "--method", "ours"))
