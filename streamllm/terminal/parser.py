"""The parser of every command: what is wrong in one line, and a help that fits the terminal."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import groupby
from textwrap import wrap
from typing import Any, NoReturn

from ..errors import plain, shown

_LONG = 24
"""Characters of choices that stand in the usage; longer ones stand in their option's help."""
_MOST = 500
"""Characters of what is wrong: some of argparse's messages repeat all that was given."""
_NUMBERS: dict[Any, str] = {int: "a whole number", float: "a number"}
_COLUMNS = re.compile(r" {2,}(?=\S)")


class CommandParser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        """options: as argparse's."""
        super().__init__(**{"formatter_class": _Help} | options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Nothing is left over, of a command's own parser neither: that knows what may have been meant."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(self._unknown(rest[0]))
        return found, rest

    def _unknown(self, word: str) -> str:
        option = word.partition("=")[0]
        if not option.startswith("-"):
            return f"{shown(word)}: one word too many"
        near = get_close_matches(option, self._option_string_actions, 1)
        return f"{shown(option)[1:-1]}: no such option{f'; did you mean {near[0]}?' if near else ''}"

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Raises argparse.ArgumentError."""
        convert: Any = action.type
        if convert not in _NUMBERS:
            return super()._get_value(action, arg_string)
        try:
            return convert(arg_string)
        except ValueError:
            raise argparse.ArgumentError(action, f"{shown(arg_string)}: must be {_NUMBERS[convert]}") from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raises argparse.ArgumentError."""
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, not_among(str(value), list(map(str, action.choices))))

    def error(self, message: str) -> NoReturn:
        """Ends the process, with exit code 2."""
        said = plain(" ".join(message.removeprefix("argument ").split()), _MOST)
        self.exit(2, f"error: {said}{'' if said.endswith('?') else ';'} see {self.prog} --help\n")


def not_among(given: str, choices: Sequence[str]) -> str:
    """What is wrong with a word."""
    near = get_close_matches(given, choices, 1)
    meant = f"; did you mean {near[0]}?" if near else ""
    return f"{shown(given)}: must be one of {', '.join(choices)}{meant}"


class _Help(argparse.HelpFormatter):
    """Texts keep their lines as long as the terminal has room for them."""

    def _fill_text(self, whole: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for is_prose, some in groupby(whole.strip("\n").splitlines(), _is_prose):
            block = list(some)
            fits = all(len(line) <= width for line in block)
            if is_prose and not fits:
                lead = block[0][: len(block[0]) - len(block[0].lstrip())]
                text = " ".join(line.strip() for line in block)
                lines += wrap(text, width, initial_indent=lead, subsequent_indent=lead)
            else:
                lines += [part for line in block for part in _folded(line, width)]
        return "".join(f"{indent}{line}\n" for line in lines)

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Any:
        if _choices_apart(action):
            return super()._metavar_formatter(argparse.Action([], "", metavar=default_metavar), default_metavar)
        return super()._metavar_formatter(action, default_metavar)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return action.dest.rpartition("_")[2].upper()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        listed = _choices_apart(action)
        return f"{action.help}; one of {', '.join(listed)}".replace("  ", " ") if listed else action.help


def _choices_apart(action: argparse.Action) -> list[str]:
    """The choices that are too long for the usage, in which an option of several words has them twice, and dots."""
    if isinstance(action, argparse._SubParsersAction):
        return []
    listed = list(map(str, action.choices or ()))
    if isinstance(action.metavar, str) and action.metavar.startswith("{"):  # those that are offered
        listed = action.metavar.strip("{}").split(",")
    elif action.metavar is not None:
        return []
    times = 3 if action.nargs in ("+", "*") else 1
    return listed if times * len(",".join(listed)) > _LONG else []


def _is_prose(line: str) -> bool:
    """Not a blank line, an example, or one with columns."""
    text = line.strip()
    return bool(text) and not text.startswith("python ") and not text.endswith(":") and not _COLUMNS.search(text)


def _folded(line: str, width: int) -> list[str]:
    """What it is of, and what is said about that, beneath one another where they have no room on a line."""
    if len(line) <= width:
        return [line]
    lead = " " * (len(line) - len(line.lstrip()))
    command, *about = _COLUMNS.split(line.strip(), maxsplit=1)
    shift = f"{lead}    "
    folded = wrap(command, width, initial_indent=lead, subsequent_indent=shift, break_on_hyphens=False)
    for text in about:
        folded += wrap(text, width, initial_indent=shift, subsequent_indent=shift)
    return folded
