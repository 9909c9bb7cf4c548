import pytest

from orchestrator.study import check_cap, spec_of
from search_spaces import SHIPPED, SpaceError, load_space
from streamllm.policy import PolicyError

GOOD = "parameters: {n_sink: [0, 4], compress_every: {low: 1, high: 9, step: 4}, method: mit}\n"


def space_of(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return load_space(str(file))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_spaces_load_and_their_known_configurations_fit(name):
    space = load_space(name)
    check_cap(space, space.cap)
    assert space.description
    for params in space.known:
        spec_of(dict(params), space, space.cap)


def test_lists_ranges_fixed_values_and_defaults(tmp_path):
    space = space_of(tmp_path, GOOD)
    assert space.parameters["n_sink"] == (0, 4)
    assert space.parameters["compress_every"] == (1, 5, 9)
    assert space.parameters["method"] == ("mit",)
    assert space.parameters["max_drop"] == (0,)
    assert (space.cap, space.cap_accounting, space.size) == (2048, "nominal", 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("cap: 5\n", "'parameters' is missing"),
        (GOOD + "caps: 5\n", r"line 2: unknown key 'caps'.*allowed: description, cap"),
        (GOOD + "cap: none\n", "line 2: cap 'none': must be a whole number"),
        (GOOD + "cap_accounting: both\n", "line 2: cap_accounting 'both': must be one of nominal, peak"),
        (GOOD + "objectives: [tpot_ms, joy]\n", "line 2: objective 'joy': must be one of tpot_ms"),
        (GOOD + "objectives: [tpot_ms]\n", "two or three"),
        ("parameters:\n  sinks: [1]\n", "line 2: unknown key 'sinks'"),
        ("parameters:\n  n_sink: [1, -2]\n", "line 2: n_sink -2"),
        ("parameters:\n  n_sink: {low: 5, high: 2}\n", "low 5 is above high 2"),
        ("parameters:\n  method: [mti]\n", "line 2: method 'mti': must be one of dense, kvpress, mit"),
        (GOOD + "known:\n  - {n_sink: 8}\n", "line 3: known n_sink 8 is not among its choices: 0, 4"),
        ("parameters: [", "not YAML"),
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
