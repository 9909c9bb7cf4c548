"""Wrong arguments end in a line, of every command; a help fits its terminal."""

import argparse

import pytest

from dashboards import pareto
from streamllm import __main__ as commands
from streamllm.terminal.parser import CommandParser
from streamllm.terminal.program import COMMANDS

from .refusals import command, dry_run, refusal, run

EVALUATE = "see python -m streamllm evaluate --help"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("evaluate", "--windw-size", "4"), f"--windw-size: no such option; did you mean --window-size? {EVALUATE}"),
        (("evaluate", "--methd=ours"), f"--methd: no such option; did you mean --method? {EVALUATE}"),
        (("evaluate", "--qqq"), f"--qqq: no such option; {EVALUATE}"),
        (("evaluate", "x\ny"), f"'x\\ny': one word too many; {EVALUATE}"),
        (("evaluate", "--window-size", "x"), f"--window-size: 'x': must be a whole number; {EVALUATE}"),
        (("evaluate", "--window-size", "y" * 5000), f"y...: must be a whole number; {EVALUATE}"),
        (("evaluate", "--strict=" + "y" * 5000), f"yyy; {EVALUATE}"),
        (("evaluate", "--window-size"), f"--window-size: expected one argument; {EVALUATE}"),
        (("evaluate", "--kv-dtype", "float8"), f"'float8': must be one of auto, {{}}did you mean float16? {EVALUATE}"),
        (("evaluate", "--protocol", "q"), f"--protocol: 'q': must be one of fast, decode-loop, chunked; {EVALUATE}"),
        (("evaluat",), "COMMAND: 'evaluat': must be one of {}did you mean evaluate? see python -m streamllm --help"),
        ((), "the following arguments are required: COMMAND; see python -m streamllm --help"),
    ],
)
def test_what_is_wrong_with_arguments(given, said):
    told = refusal(command(*given))
    begin, _, end = said.partition("{}")
    assert begin in told and told.endswith(end)


def test_of_the_other_packages_too():
    assert refusal(dry_run("--trails", "5")) == (
        "--trails: no such option; did you mean --trials? see python -m orchestrator.sweep --help"
    )
    assert "--formt: no such option; did you mean --format?" in refusal(run(pareto.main, "x", "--formt", "md"))
    assert "did you mean --trials?" in refusal(command("sweep", "--trails", "5"))


def helps(parser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("name", ["", "backends", "evaluate", "harness", "recall", *COMMANDS])
def test_a_help_fits(monkeypatch, name, width):
    monkeypatch.setenv("COLUMNS", str(width))
    done = run(commands.main, *([name] * bool(name)), "--help")
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    fixed = 20 * (width < 80)  # an option's own name, behind the command's
    assert [line for line in lines if len(line) > width + fixed] == []


def test_choices_are_in_the_usage_or_in_the_help(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = CommandParser(prog="p")
    parser.add_argument("--few", choices=("ab", "cd"), help="of few")
    parser.add_argument("--some-words", choices=("auto", "a" * 12, "b" * 12), help="of long ones")
    shown = " ".join(parser.format_help().split())
    assert "--few {ab,cd} of few --some-words WORDS of long ones; one of auto, " + "a" * 12 in shown


def test_texts_keep_their_lines_where_there_is_room(monkeypatch):
    prose = "Some words that are said\nof it, in two lines of text."
    example = "python -m streamllm one        what it does"
    shown = {}
    for width in (100, 28):
        monkeypatch.setenv("COLUMNS", str(width))
        shown[width] = CommandParser(prog="p", epilog=f"{prose}\n\n{example}").format_help()
    assert f"{prose}\n\n{example}\n" in shown[100]
    assert "Some words that are said\nof it, in two lines of\ntext.\n" in shown[28]
    assert "\npython -m streamllm one\n    what it does\n" in shown[28]
