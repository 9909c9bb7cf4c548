"""A part of what `python -m tests.fuzz.inputs` does, always the same; and that the tool sees what is wrong."""

import time

import pytest

from streamllm.errors import UsageError

from .fuzz import inputs
from .fuzz.inputs import KINDS, attempt

CASES = {"model": 120, "whole": 4, "space": 250}
OTHERS = 300


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_taken_is_taken_and_all_else_is_a_line(kind):
    outcomes = [attempt(kind, 0, number) for number in range(CASES.get(kind, OTHERS))]
    wrong = [f"{kind} 0:{number}: {found.wrong}" for number, found in enumerate(outcomes) if found.wrong]
    assert not wrong, "\n".join(wrong[:5])
    assert any(not found.said for found in outcomes), "all damaged beyond what a good input is"
    assert kind == "whole" or any(found.said for found in outcomes), "nothing damaged"


@pytest.mark.parametrize("kind", ["space", "env", "token_ids", "sweeps_options"])
def test_a_case_is_always_the_same(kind):
    assert [attempt(kind, 7, n).said for n in range(20)] == [attempt(kind, 7, n).said for n in range(20)]


@pytest.mark.parametrize(
    ("does", "wrong"),
    [
        (ValueError("any"), "ValueError: any"),
        (UsageError("x: two\nlines"), "not one line"),
        (UsageError("x: " + "y" * 700), "703 characters"),
        (UsageError("it is wrong"), "names nothing"),
        (lambda: time.sleep(30), "TooLongError"),
        (lambda: bytearray(2**33), "MemoryError"),
        (lambda: inputs._run(lambda: 1), "AssertionError"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_wrong_is_seen(does, wrong, monkeypatch):
    def kind(_):
        if isinstance(does, Exception):
            raise does
        does()

    monkeypatch.setitem(KINDS, "env", kind)
    monkeypatch.setattr(inputs, "SECONDS", 1)
    assert wrong in attempt("env", 0, 0).wrong
