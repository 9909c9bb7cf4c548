"""What a stored measurement's name covers: the code that determines a number, the libraries, the machine; nothing
else."""

import ast
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from streamllm.configuration import Configuration
from streamllm.engine.methods import METHODS, module_of
from streamllm.harness import results
from streamllm.measuring import conditions, store
from streamllm.measuring.conditions import Conditions, described, software
from streamllm.measuring.jobs import Job
from streamllm.measuring.keys import Keys
from streamllm.measuring.measurements import Measurements
from streamllm.measuring.store import MEASURING_CODE, MeasurementStore, entry_name
from streamllm.measuring.text import TokenStream
from streamllm.policy import EvictionPolicy

PACKAGE = Path(store.__file__).parent.parent
ROOTS = {"measuring.bench", "measuring.plans", "engine.loading", "engine.methods.ring"}
"""What measures, what is asked for, what loads, and the method of the reference that everything is timed beside."""
WORDS = {"results", "results.field", "results.schema", "version"}
"""How a configuration is shown, and what a row says of who measured it."""
POLICY = EvictionPolicy(n_sink=4, window_size=20)


def source(module):
    path = PACKAGE.joinpath(*module.split(".")) if module else PACKAGE
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(module):
    """The package's modules that a module imports, wherever in it, but for what is there for a type checker only."""
    tree = ast.parse(source(module).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    package = [name for name in module.split(".") if name]
    package = package if source(module).name == "__init__.py" else package[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) + 1 - node.level]
            where = [*start, *(node.module.split(".") if node.module else ())]
            found |= {".".join(where), *(".".join([*where, alias.name]) for alias in node.names)}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not [name for name in names if name.startswith("streamllm")], f"{module}: import it relatively"
    return {name for name in found if name and source(name).is_file()}


def reached(roots):
    found, ahead = set(), roots - WORDS
    while ahead:
        found |= ahead
        ahead = {name for module in ahead for name in imported(module)} - found - WORDS
    return found


def test_all_code_that_determines_a_number_is_hashed_and_nothing_else():
    """Whoever makes measuring code import one module more is told here: hash it, or put what is needed elsewhere."""
    of_methods = {name for method in METHODS for name in imported(module_of(method))}
    of_package = imported("")  # which whoever imports any of it imports
    assert set(MEASURING_CODE) == reached(ROOTS | of_methods | of_package)
    assert list(MEASURING_CODE) == sorted(set(MEASURING_CODE))


def test_what_shows_and_what_is_typed_is_not_hashed():
    shown = {
        "figure_style",
        "terminal.screen",
        "terminal.printing",
        "terminal.progress",
        "explain.diagnosis",
        "explain.diagnosis_figure",
        "explain.profiling",
        "explain.writing",
        "commands",
        "terminal.arguments",
        "terminal.output",
        "measuring.reference_time",
        "measuring.certainty",
        "engine.generation",
        "measuring.pace",
    }
    assert all(source(name).is_file() for name in shown), "or this test says nothing"
    assert not {name for name in MEASURING_CODE if any(name == of or name.startswith(f"{of}.") for of in shown)}


def test_a_tasks_result_is_named_by_the_code_that_scores_and_writes():
    of_harness = {f"harness.{path.stem}" for path in (PACKAGE / "harness").glob("[a-z]*.py")} - {
        "harness.jobs",
        "harness.results",
    }
    beside = {name for module in of_harness for name in imported(module)} - set(MEASURING_CODE) - WORDS
    words = {
        "evaluating",
        "harness",
        "harness.results",
        "terminal.arguments",
        "terminal.progress",
    }  # what is asked for, and what is said
    assert {*of_harness, *beside} - words == set(results._CODE)


@pytest.fixture
def digest_after(tmp_path, monkeypatch):
    """The digest of the package's code after something was appended to a module of it."""

    def digest(module="", more="", *methods):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("model", "__pycache__"))
        if module:
            path = copy / source(module).relative_to(PACKAGE)
            path.write_text(path.read_text() + more)
        monkeypatch.setattr(store, "_source", lambda name: copy / source(name).relative_to(PACKAGE))
        return store.code_digest.__wrapped__(*methods)

    return digest


def test_code_that_determines_a_number_is_in_the_digest_colours_and_comments_are_not(digest_after):
    before = digest_after()
    assert before == store.code_digest()
    for module in ("measuring.timing", "engine.methods.ring", "testbed"):
        assert digest_after(module, "\nMORE = 1\n") != before, module
    for module in ("figure_style", "commands.evaluate", "engine.methods.recompute", ""):
        assert digest_after(module or "explain.diagnosis", "\nMORE = 1\n") == before, module
    assert digest_after("measuring.timing", '\n\n# a comment\n\n"""A docstring."""\n') == before
    own = digest_after("", "", "recompute")
    assert own != before and digest_after("engine.methods.recompute", "\nMORE = 1\n", "recompute") != own
    assert digest_after("engine.methods.kvpress_shim", "\nMORE = 1\n", "recompute") == own


@pytest.fixture
def names(golden_model, golden_tokens, monkeypatch):
    """The store's names of a model's measurements where versions are as given."""
    stream = TokenStream(golden_tokens, "golden", "digest")

    def names(loaded=None, **versions):
        versions = {name.replace("_", "-"): version for name, version in versions.items()}
        monkeypatch.setattr(conditions, "installed", lambda name: versions.get(name, "1.0"))
        keys = Keys(Conditions.of(loaded or golden_model("llama-tiny")), stream, 24)
        jobs = {
            "quality": Job("quality", Configuration("ring", POLICY)),
            "baseline": Job("quality", Configuration("recompute", POLICY), batch=0),
            "speed": Job("speed", Configuration("ours", POLICY)),
            "flash": Job("speed", Configuration("ours", POLICY, "flash_attention_2")),
            "whole": Job("whole", Configuration("ours", POLICY), "decode-loop"),
            "kvpress": Job("whole", Configuration("kvpress", POLICY), "decode-loop"),
            "shim": Job("whole", Configuration("kvpress_shim", POLICY), "decode-loop"),
        }
        return {kind: entry_name(keys.of(job)) for kind, job in jobs.items()}

    return names


ALL = {"quality", "baseline", "speed", "flash", "whole", "kvpress", "shim"}
TIMED = {"speed", "flash", "whole", "kvpress", "shim"}


@pytest.mark.parametrize(
    ("library", "concerned"),
    [
        ("torch", ALL),
        ("transformers", ALL),
        ("kvpress", {"kvpress", "shim"}),
        ("flash_attn", {"flash"}),
        ("torchao", set()),
        ("triton", set()),  # on a CPU
        ("numpy", set()),
        ("mlflow", set()),
    ],
)
def test_another_version_is_another_measurement_of_what_it_determines(names, library, concerned):
    before, after = names(), names(**{library: "2.0"})
    assert {kind for kind in ALL if before[kind] != after[kind]} == concerned


def test_torchao_counts_where_it_quantized_the_weights(names, golden_model):
    loaded = replace(golden_model("llama-tiny"), digest="d int8_weight_only")
    before, after = names(loaded), names(loaded, torchao="2.0")
    assert not {kind for kind in ALL if before[kind] == after[kind]}


def test_times_alone_depend_on_python_and_on_how_threads_wait(names, monkeypatch):
    before = names()
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    after = names()
    assert {kind for kind in ALL if before[kind] != after[kind]} == TIMED
    monkeypatch.setattr(conditions.platform, "python_version", lambda: "3.99.0")
    assert {kind for kind in ALL if after[kind] != names()[kind]} == TIMED


def test_on_cuda_times_depend_on_runtime_driver_and_triton(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(conditions, "_driver", lambda kind: {"cuda": "570.1"}.get(kind))
    found = software(torch.device("cuda"))
    assert (found["cuda"], found["driver"]) == ("12.8", "570.1")
    assert "triton" in found and "omp_wait_policy" not in found
    assert "cuda 12.8, driver 570.1" in described(found | {"rocm": None}) and "None" not in described(found)
    assert "driver" not in software(torch.device("cpu")) and "cuda" not in software(torch.device("mps"))


def test_nvidias_driver_is_asked_for_its_version(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 570.86.15\necho 570.86.15\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert conditions._driver.__wrapped__("cuda") == "570.86.15"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert conditions._driver.__wrapped__("cuda") is None


def test_results_name_their_entries_in_the_store(tmp_path, golden_model, golden_tokens):
    stream = TokenStream(golden_tokens[:60], "golden", "digest")
    of, what = (
        Measurements.of(MeasurementStore(tmp_path), golden_model("llama-tiny"), stream, 24),
        Configuration("ours", POLICY),
    )
    for fresh in (True, False):
        found = of.whole("fast", what)
        assert found.is_fresh == fresh
        quality, speed = (of.store.key(found.record[f"{name}_entry"]) for name in ("quality", "speed"))
        assert quality["kind"] == "quality of streaming" and speed["kind"] == "speed"
        assert [quality, speed] == [of.keys.of(Job("quality", what)), of.keys.of(Job("speed", what))]
    again = of.whole("fast", what, run=1)
    assert of.store.key(again.record["speed_entry"]) == speed | {"run": 1}
    whole = of.whole("decode-loop", what)
    assert whole.record["quality_entry"] == whole.record["speed_entry"]
    assert of.store.key(whole.record["speed_entry"])["protocol"] == "decode-loop"
    (of.store.root / speed["kind"]).write_text("")
    assert of.store.key("0" * 64) is None
