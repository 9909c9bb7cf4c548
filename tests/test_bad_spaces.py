"""Spaces and matrices that are broken, or of which nothing can be measured."""

import os

import pytest

from orchestrator import sweep
from search_spaces import SpaceError, is_matrix, load_matrix, load_space

from .refusals import dry_run, refusal, run, within

GOOD = "parameters: {n_sink: [0, 4], compress_every: {low: 1, high: 9, step: 4}, method: [mit]}\n"
LAUGHS = "a0: &a0 [1, 2]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


def read(path):
    """Soon, or not at all."""
    with within(20, mib=512):
        return load_matrix(path) if is_matrix(path) else load_space(path)


def message_of(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpaceError) as caught:
        read(str(path))
    message = str(caught.value)
    assert "mine.yaml" in message and "\n" not in message and len(message) < 600, message
    return message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parameters: {n_sink: !!python/object:os.system [1]}", "!!python/object:os.system"),
        ("parameters: {n_sink: !!python/name:os.system ''}", "'!!python/name:os.system'"),
        ("parameters: {n_sink: !foo 3}", "line 1: '!foo'"),
        ("parameters: {method: !!binary aGk=}", "must be one of"),
        ("parameters: {n_sink: !!int x}", "line 1: 'x'"),
        ("parameters: !foo {n_sink: 3}", "line 1: '!foo'"),
        (GOOD + "description: 2024-13-45", "line 2: '2024-13-45'"),
        (GOOD + "cap: 2024-12-31", "must be a whole number"),
        ("parameters: " + "[" * 10_000 + "]" * 10_000, "nested too deeply"),
        ("parameters: {n_sink: " + "[" * 300 + "]" * 300 + "}", "a single value is expected"),
        ("parameters: {n_sink: " + "7" * 5000 + "}", "line 1: '7777"),
        ("parameters: {n_sink: 0x" + "f" * 5000 + "}", "whole number from 0 to"),
        ("parameters: {n_sink: {low: 1, high: 1000000000000}}", "1000000000000 choices; give at most"),
        ("parameters: {n_sink: null}", "n_sink None: must be a whole number"),
        ("parameters: {n_sink: ~}", "n_sink None: must be a whole number"),
        ("parameters: {n_sink: }", "n_sink None: must be a whole number"),
        ("parameters: {method: }", "method None: must be one of"),
        ("parameters:\n", "parameters must be a mapping"),
        (GOOD + "known: null", "known must be a list"),
        (GOOD + "known: [null]", "a known configuration must be a mapping"),
        (GOOD + "constraints: [null]", "constraint None: must be METRIC"),
        (GOOD + "description: {a: 1}", "a single value is expected"),
        (GOOD + "cap: [1]", "a single value is expected"),
        (GOOD + "cap: -3", "cap -3"),
        (GOOD + "cap: true", "cap True: must be a whole number"),
        (GOOD + "cap: .nan", "cap nan: must be a whole number"),
        (GOOD + "cap: .inf", "cap inf: must be a whole number"),
        (GOOD + "cap: 1e400", "cap '1e400'"),
        (GOOD + "cap: 1" + "0" * 30, "cap 1000"),
        (GOOD + "cap: '12'", "cap '12': must be a whole number"),
        (GOOD + "cap: 12.0", "cap 12.0: must be a whole number"),
        (GOOD + "objectives: tpot_ms", "objectives must be a list"),
        (GOOD + "constraints: speedup", "constraints must be a list"),
        (GOOD + "constraints: ['speedup >= " + "9" * 400 + "']", "constraint 'speedup >= 999"),
        ("parameters: {n_sink: true}", "n_sink True: must be a whole number"),
        ("parameters: {n_sink: [0, no]}", "n_sink False: must be a whole number"),
        ("parameters: {n_sink: [.nan]}", "n_sink nan: must be a whole number"),
        ("parameters: {n_sink: [{a: 1}]}", "a single value is expected"),
        ("parameters: {n_sink: []}", "n_sink must be a list of at least one entry"),
        ("parameters: {n_sink: {low: 0, high: true}}", "n_sink high True"),
        ("parameters: {n_sink: {low: 0, high: 8, step: 0}}", "n_sink step 0"),
        ("parameters: {n_sink: [4, 4]}", "given twice"),
        ("parameters: {n_sink: 1}\nparameters: {n_sink: 2}", "line 2: key 'parameters' is given twice"),
        ("parameters: {[a, b]: 1}", "unknown key"),
        ("parameters: {n_sink: {choices: [1, 2], when: 3}}", "when of n_sink must be a mapping"),
        ("parameters: {n_sink: {choices: [1, 2], when: {max_drop: }}}", "max_drop None"),
        ("parameters: {n_sink: {choices: [1, 2], when: {max_drop: 0}, when: {max_drop: 0}}}", "given twice"),
        ("[]", "the space must be a mapping"),
        ("3", "the space must be a mapping"),
        ("a: *b", "not YAML"),
        ("%YAML 9.9\n---\na: 1", "not YAML"),
        ("a: 1\n---\nb: 2\n", "not YAML"),
        ("parameters: &a {n_sink: *a}", "unknown key 'n_sink' in n_sink"),
        ("parameters: {n_sink: &a [*a]}", "a single value is expected"),
        (LAUGHS + GOOD, "unknown key 'a0'"),
        (LAUGHS.replace("\n", ", ").join(["parameters: {n_sink: *b}\nx: {", "}"]), "not YAML"),
        (GOOD.encode("utf-16"), "not UTF-8"),
        (b"description: caf\xe9\n" + GOOD.encode(), "not UTF-8"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "not UTF-8"),
        (GOOD + "description: a\0b", "not YAML"),
        (GOOD + "description: a\x07b", "not YAML"),
        (GOOD + "known: [" + "{n_sink: 4}, " * 30_000 + "]", "more than 256 KiB"),
        ("parameters: {n_sink: " + "x" * 5000 + "}", "n_sink 'xxx"),
        ("parameters: {" + "x" * 900 + ": 1}", "unknown key 'xxx"),
        ("parameters: {" + "x" * 5000 + ": 1}", "not YAML"),
        (GOOD + "constraints: [speedup >= 2, speedup <= 1.5]", "speedup >= 2 and speedup <= 1.5"),
        (
            "parameters: {n_sink: {low: 1, high: 9000}, cache_slack: {low: 1, high: 9000, "
            "when: {n_sink: 3, max_drop: 2, compress_every: 3}}, max_drop: {low: 1, high: 900}, "
            "compress_every: {low: 1, high: 9000}}",
            "combinations",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_broken_spaces_are_a_line(tmp_path, text, message):
    assert message in message_of(tmp_path, text)


MATRIX = "matrix: {n_sink: [0, 4], method: [mit, ours]}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("matrix:\n", "matrix must be a mapping"),
        ("matrix: {n_sink: null}", "n_sink None"),
        ("matrix: {dataset: null}", "dataset None"),
        ("matrix: {dataset: ''}", "dataset ''"),
        ("matrix: {dataset: [a, 2024-13-45]}", "line 1: '2024-13-45'"),
        ("matrix: {dataset: !foo a}", "line 1: '!foo'"),
        (MATRIX + "cap: !!python/none ''", "line 2"),
        (MATRIX + "file: '{n_sink:>1000000000}_{method}'", "may name {"),
        (MATRIX + "file: '{n_sink.real.__class__}_{method}'", "may name {"),
        (MATRIX + "file: '{n_sink'", "may name {"),
        (MATRIX + "file: '{n_sink:{method}}{method}'", "may name {"),
        (MATRIX + "file: '" + "x" * 300 + "{n_sink}{method}'", "bytes"),
        (MATRIX + "file: null", "file None"),
        (MATRIX + "names: [1]", "names must be a mapping"),
        (MATRIX + "names: {method: [1]}", "names of method must be a mapping"),
        (MATRIX + "names: {method: {[1]: a}}", "a single value is expected"),
        (MATRIX + "max_eval_tokens: 1", "max_eval_tokens 1"),
        (MATRIX + "max_eval_tokens: {[1]: 3}", "a single value is expected"),
        (MATRIX + "max_eval_tokens: {a: 1" + "0" * 40 + "}", "max_eval_tokens of a"),
        (MATRIX + "configurations: [{name: , n_sink: 3}]", "n_sink: is an axis"),
        (MATRIX + "configurations: [{name: [1]}]", "a single value is expected"),
        (MATRIX + "configurations: null", "configurations must be a list"),
        (MATRIX + "columns: [[1]]", "a single value is expected"),
        (
            f"matrix: {{n_sink: {list(range(999))}, max_drop: {list(range(999))}, total_kv: {list(range(5, 999))}}}",
            "cells; give at most",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_broken_matrices_are_a_line(tmp_path, text, message):
    assert message in message_of(tmp_path, text)


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000, "a\0b", "/", ".", "", "\udcff"])
def test_names_of_no_space(name):
    with pytest.raises(SpaceError, match="neither a file nor one of") as caught:
        load_space(name)
    assert len(str(caught.value)) < 600


def test_a_space_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    path.chmod(0)
    if os.geteuid() == 0:  # who may read everything

        def denied(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(type(path), "open", denied)
    with pytest.raises(SpaceError, match=r"mine\.yaml: cannot be read \(Permission denied\)"):
        load_space(str(path))


IMPOSSIBLE = [
    ("parameters: {method: ours, execution: compile}", "execution 'compile'"),
    ("parameters: {method: [ours, mit], execution: [compile]}", "execution 'compile'"),
    ("parameters: {n_sink: [64, 128], total_kv: [32, 64]}", "cap 64: below n_sink"),
    ("cap_accounting: peak\nparameters: {compress_every: 0, total_kv: 64}", "cap 64 by peak accounting"),
    ("cap_accounting: peak\nparameters: {compress_every: [128, 512], total_kv: [16, 64]}", "cap 64 by peak accounting"),
    (
        "parameters: {method: [ring, ours], execution: {choices: [compile], when: {method: ours}}, "
        "n_sink: {choices: [128, 300], when: {method: ring}}, total_kv: 64}",
        "mine",
    ),
]


@pytest.mark.parametrize(("text", "message"), IMPOSSIBLE, ids=lambda value: value[:60])
def test_spaces_of_which_no_point_is_possible(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    said = refusal(dry_run("--space", "mine.yaml", cwd=tmp_path))
    assert "space 'mine'" in said and message in said


def test_the_sweep_says_it_before_ray_is_started(tmp_path):
    """Which is a line of its own."""
    (tmp_path / "mine.yaml").write_text(IMPOSSIBLE[0][0])
    assert "space 'mine'" in refusal(run(sweep.main, "--space", "mine.yaml", cwd=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml"]


def test_a_space_is_not_refused_for_some_points_that_are_impossible(tmp_path):
    (tmp_path / "mine.yaml").write_text("parameters: {method: [ours, ring], execution: [compile, eager]}")
    assert dry_run("--space", "mine.yaml", "--max-eval-tokens", "300", cwd=tmp_path).returncode == 0
