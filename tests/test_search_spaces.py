import pytest

from orchestrator.search.points import check_cap, configuration_of
from orchestrator.sweep import main
from search_spaces import SHIPPED, SpaceError, is_matrix, load_space
from streamllm.policy import EvictionPolicy, PolicyError, with_derived_window

SPACES = [name for name in SHIPPED if not is_matrix(name)]
GOOD = "parameters: {n_sink: [0, 4], compress_every: {low: 1, high: 9, step: 4}, method: mit}\n"
CONDITIONAL = """parameters:
  n_sink: [0, 4]
  method: [ring, ours]
  cache_slack: [0, 8, 16]
  max_drop: {choices: [8, 32], when: {cache_slack: [8, 16], method: ring}}
"""


def space_of(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return load_space(str(file))


@pytest.mark.parametrize("name", SPACES)
def test_shipped_spaces_load_and_their_known_configurations_fit(name):
    space = load_space(name)
    check_cap(space, space.cap)
    assert space.description
    for params in space.known:
        configuration_of(dict(params), space, space.cap)
    points = [tuple(params.items()) for params in space.points()]
    assert len(points) == len(set(points)) == space.size


@pytest.mark.parametrize("name", SPACES)
def test_shipped_spaces_can_be_tried_on_the_embedded_model(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--space", name, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    space = load_space(name)
    cap = 256 // space.keys_per_total  # the model was trained on as many tokens
    assert f"{cap} ({space.cap_accounting} accounting; the space says 2048)" in shown
    assert "left out" not in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("devices", [(), {"cpu"}, {"mps"}])
def test_without_cuda_the_default_space_is_what_it_always_was(devices):
    """Studies of it go on."""
    space = load_space("default", devices)
    assert (space.size, space.when, space.defaults) == (4032, {}, {})
    assert space.parameters["execution"] == ("eager",)
    assert [params["method"] for params in space.known] == ["mit", "ours", "ring", *["ours"] * 5]


def test_on_cuda_the_default_space_has_the_fastest_ring_from_the_start():
    space = load_space("default", {"cuda"})
    assert space.size == 4032 // 3 * 5 // 2 * 3
    assert space.parameters["attn_backend"] == ("flash", "math", "ring_triton")
    assert space.parameters["execution"] == ("eager", "compile", "cudagraph")
    rings = [params["execution"] for params in space.known if params["method"] == "ring"]
    assert rings == ["eager", "compile", "cudagraph"]
    for params in space.known:
        configuration_of(dict(params), space, space.cap)
    assert {params["execution"] for params in space.points() if params["method"] != "ring"} == {"eager"}
    assert load_space("methods", {"cuda"}).parameters["execution"] == ("eager", "compile", "cudagraph")
    assert load_space("methods").parameters["execution"] == ("eager", "compile")


CUDA = """parameters:
  method: [ring, ours]
  attn_backend: {choices: [math], cuda: [flash, cudnn]}
  execution: {choices: [eager], cuda: cudagraph, when: {method: ring}}
  n_sink: {choices: [0, 2], when: {attn_backend: [cudnn]}}
  compress_every: {choices: [1, 8], when: {attn_backend: [math, flash]}}
known:
  - {method: ring, execution: cudagraph, attn_backend: flash}
  - {method: ring}
"""


def test_choices_that_want_cuda_and_what_depends_on_them(tmp_path):
    here = space_of(tmp_path, CUDA)
    assert here.parameters["attn_backend"] == ("math",) and here.parameters["execution"] == ("eager",)
    assert here.parameters["n_sink"] == (4,) and here.parameters["compress_every"] == (1, 8)
    assert here.when == {"compress_every": {"attn_backend": ("math",)}} and here.size == 4
    assert [params["execution"] for params in here.known] == ["eager"]
    there = load_space(str(tmp_path / "mine.yaml"), {"cuda"})
    assert there.parameters["attn_backend"] == ("math", "flash", "cudnn") and set(there.when) == {
        "execution", "n_sink", "compress_every"
    }  # fmt: skip
    assert [params["execution"] for params in there.known] == ["cudagraph", "eager"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[flash, cudnn]", "[flash, cudn]", "line 3: attn_backend 'cudn': must be one of"),
        ("[flash, cudnn]", "[flash, math]", "line 3: attn_backend: a choice is given twice"),
        ("[cudnn]", "[efficient]", "line 5: n_sink when attn_backend 'efficient' is not among its choices"),
        ("attn_backend: flash}", "attn_backend: flash, n_sink: 9}", "line 8: known n_sink 9 is not among"),
        (
            "choices: [1, 8]",
            "low: 1, high: 8, cuda: [9]",
            "line 6: unknown key 'cuda' in compress_every",
        ),
    ],
)
def test_what_wants_cuda_is_checked_without_it(old, new, message, tmp_path):
    assert old in CUDA
    with pytest.raises(SpaceError, match=message):
        space_of(tmp_path, CUDA.replace(old, new))


def test_quantization_is_a_parameter_of_the_spaces_that_name_it(tmp_path):
    """Other spaces leave it to the command line, and their studies are what they were."""
    plain = space_of(tmp_path, GOOD)
    assert "quantization" not in plain.parameters
    assert configuration_of(next(iter(plain.points())), plain, 64).quantization is None
    text = "parameters:\n  method: [ring, ours]\n"
    text += "  quantization: {choices: [none, int8_weight_only], when: {method: ring}}\n"
    space = space_of(tmp_path, text + "known: [{method: ring, quantization: int8_weight_only}]\n")
    specs = [configuration_of(params, space, 64) for params in space.points()]
    assert [one.quantization for one in specs] == ["none", "int8_weight_only", "none"]
    assert configuration_of(dict(space.known[0]), space, 64).quantization == "int8_weight_only"
    unnamed = "parameters: {n_sink: {choices: [0, 1], when: {quantization: none}}}"
    for bad, message in (
        (text.replace("int8_w", "int9_w"), "line 3: quantization 'int9_weight_only': must be one of none, int8"),
        (GOOD + "known: [{quantization: none}]\n", "line 2: unknown key 'quantization' in a known configuration"),
        (unnamed, "unknown key 'quantization' in when of n_sink"),
    ):
        with pytest.raises(SpaceError, match=message):
            space_of(tmp_path, bad)


def test_lists_ranges_fixed_values_and_defaults(tmp_path):
    space = space_of(tmp_path, GOOD)
    assert space.parameters["n_sink"] == (0, 4)
    assert space.parameters["compress_every"] == (1, 5, 9)
    assert space.parameters["method"] == ("mit",)
    assert space.parameters["max_drop"] == (0,)
    assert (space.cap, space.cap_accounting, space.size) == (2048, "nominal", 6)


def test_by_bytes_a_narrower_format_has_more_keys_within_the_trained_length(tmp_path):
    space = space_of(
        tmp_path,
        "cap: 64\ncap_accounting: bytes\n"
        "parameters: {kv_dtype: [float16, float8_e4m3], total_kv: [32, 64], n_sink: 4, method: ring}",
    )
    kept = {
        (point["kv_dtype"], point["total_kv"]): configuration_of(point, space, 64).policy.kept
        for point in space.points()
    }
    assert kept == {("float16", 32): 32, ("float16", 64): 64, ("float8_e4m3", 32): 64, ("float8_e4m3", 64): 128}
    assert space.keys_per_total == 2
    with pytest.raises(PolicyError, match="name one of float16, bfloat16, float8_e4m3"):
        with_derived_window(EvictionPolicy(), 64, "bytes")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("cap: 5\n", "'parameters' is missing"),
        (GOOD + "caps: 5\n", r"line 2: unknown key 'caps'.*allowed: description, cap"),
        (GOOD + "cap: none\n", "line 2: cap 'none': must be a whole number"),
        (GOOD + "cap_accounting: both\n", "line 2: cap_accounting 'both': must be one of nominal, peak, bytes"),
        (GOOD + "cap_accounting: bytes\n", "line 2: cap_accounting bytes: kv_dtype 'auto': has the model's bytes"),
        (GOOD + "objectives: [tpot_ms, joy]\n", "line 2: objective 'joy': must be one of tpot_ms"),
        (GOOD + "objectives: [tpot_ms]\n", "two or three"),
        ("parameters:\n  sinks: [1]\n", "line 2: unknown key 'sinks'"),
        ("parameters:\n  n_sink: [1, -2]\n", "line 2: n_sink -2"),
        ("parameters:\n  n_sink: {low: 5, high: 2}\n", "low 5 is above high 2"),
        ("parameters:\n  method: [mti]\n", "line 2: method 'mti': must be one of dense, kvpress, kvpress_shim, mit"),
        (GOOD + "known:\n  - {n_sink: 8}\n", "line 3: known n_sink 8 is not among its choices: 0, 4"),
        ("parameters: [", "not YAML"),
        ("parameters:\n  n_sink: {low: 0, high: 8, log: true}\n", "line 2: n_sink low 0: must be a whole number >= 1"),
        ("parameters:\n  n_sink: {low: 1, high: 8, log: 3}\n", "line 2: log 3: must be one of True, False"),
        ("parameters:\n  n_sink: {low: 1}\n", "line 2: n_sink: needs choices, or low and high"),
        ("parameters:\n  n_sink: {choices: [1], step: 2}\n", "line 2: n_sink: has choices, so step cannot be meant"),
        (
            "parameters:\n  method: {low: 1, high: 2}\n",
            "line 2: unknown key 'low' in method; allowed: choices, cuda, when",
        ),
        ("cap: 64\nparameters:\n  total_kv: [32, 128]\n", "line 3: total_kv 128: must not be above the cap 64"),
        (GOOD + "constraints: [joy <= 3]\n", "line 2: constraint 'joy <= 3': must be METRIC <= NUMBER"),
        (GOOD + "constraints: [speedup < 3]\n", "line 2: constraint 'speedup < 3': must be METRIC <= NUMBER"),
        (
            CONDITIONAL + "  compress_every: {choices: [1, 2], when: {max_drop: 8}}\n",
            "line 6: compress_every: depends on max_drop, which",
        ),
        ("parameters:\n  n_sink: {choices: [0, 1], when: {method: mit}}\n", "line 2: n_sink when method 'mit' is not"),
        (
            "parameters:\n  n_sink: {choices: [0, 1], when: {sinks: 1}}\n",
            "line 2: unknown key 'sinks' in when of n_sink",
        ),
        ("parameters:\n  n_sink: {choices: [0, 1], when: {}}\n", "line 2: n_sink: when needs at least one"),
        (CONDITIONAL + "known: [{max_drop: 8}]\n", "line 6: known max_drop 8 is not among its choices: 0"),
    ],
)
def test_errors_name_file_line_key_and_what_is_allowed(tmp_path, text, message):
    with pytest.raises(SpaceError, match=message) as caught:
        space_of(tmp_path, text)
    assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_space_lists_the_shipped_ones():
    with pytest.raises(SpaceError, match="default"):
        load_space("defualt")


def test_a_cap_too_small_for_the_space_is_refused(tmp_path):
    with pytest.raises(PolicyError, match=r"'mine': cap 4: .*at least 5"):
        check_cap(space_of(tmp_path, GOOD), 4)


def test_log_ranges_multiply(tmp_path):
    space = space_of(
        tmp_path,
        "parameters: {n_sink: {low: 3, high: 24, log: true}, max_drop: {low: 1, high: 99, log: true, step: 10}}",
    )
    assert space.parameters["n_sink"] == (3, 6, 12, 24)
    assert space.parameters["max_drop"] == (1, 10)


def test_conditional_parameters_exist_only_where_they_are_meant(tmp_path):
    space = space_of(tmp_path, CONDITIONAL + "known: [{cache_slack: 8, n_sink: 4}]\n")
    points = list(space.points())
    assert space.size == len(points) == 2 * (2 * 2 + 1 + 3) == len({tuple(point.values()) for point in points})
    for point in points:
        exists = point["cache_slack"] in (8, 16) and point["method"] == "ring"
        assert (point["max_drop"] in (8, 32)) if exists else point["max_drop"] == 0
        assert space.complete({name: value for name, value in point.items() if space.active(name, point)}) == point
    assert space.known[0]["max_drop"] == 8  # what is left out is the first choice


def test_a_shorter_trained_length_takes_the_place_of_longer_totals(tmp_path):
    text = (
        "cap: 512\nparameters:\n  total_kv: {low: 64, high: 512, log: true}\n"
        "  max_drop: {choices: [0, 8], when: {total_kv: 512}}\n"
        "known: [{total_kv: 512, max_drop: 8}, {total_kv: 256}]\n"
    )
    space = space_of(tmp_path, text)
    assert space.parameters["total_kv"] == (64, 128, 256, 512)
    short = space.under(128)
    assert short.parameters["total_kv"] == (64, 128)
    assert [(params["total_kv"], params["max_drop"]) for params in short.known] == [(128, 8), (128, 0)]
    assert short.active("max_drop", {"total_kv": 128}) and not short.active("max_drop", {"total_kv": 64})
    assert configuration_of(dict(short.known[0]), short, 128).policy.window_size == 124
    assert space.under(4096) == space
    check_cap(short, 128)


def test_constraints_say_by_how_much_they_are_violated(tmp_path):
    space = space_of(tmp_path, GOOD + "constraints: [ppl_increase_percent <= 3, speedup>=2.5]\n")
    increase, speedup = space.constraints
    assert [str(increase), str(speedup)] == ["ppl_increase_percent <= 3", "speedup >= 2.5"]
    assert increase.excess({"ppl_increase_percent": 4.0}) == pytest.approx(1.0)
    assert increase.excess({"ppl_increase_percent": 3.0}) == 0
    assert speedup.excess({"speedup": 2.0}) == pytest.approx(0.5)
    assert speedup.excess({"speedup": 9.0}) < 0
    assert increase.excess({}) == increase.excess({"ppl_increase_percent": float("nan")}) == float("inf")
