"""Conditions on rows, `backend = 'flash' and ppl_increase_percent < 3`: their grammar, which `GRAMMAR` tells.

`page/conditions.js` is the same for a report's box, function by function; a test holds the two to each other. Values
that are not there, or not finite, are unknown (None), as is what is computed of them, by the rules of SQL.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from streamllm.results.schema import AnyRow

GRAMMAR = (
    "A condition compares: ppl_increase_percent < 3, backend = 'flash', n_sink in (4, 8), max_drop between 1 and 16, "
    "reason like '%memory%', warning is not null. There are = != < <= > >=, + - * / %, and, or, not, parentheses.",
    "A column alone is true where its value is neither missing nor 0: front, feasible, reason. A number alone is that "
    "of a trial. Any other word, or a text in quotes, is looked for as whole words in all columns of text. What stands "
    "side by side must all be true: ring flash.",
    "Columns are named as in exported tables, with _low and _high for the ends of intervals; MLflow's spelling "
    "(tags.`backend.used`, metrics.tpot_ms) is understood.",
)
"""What a reader has to know, in paragraphs."""
EXAMPLE = "backend = 'flash' and ppl_increase_percent < 3"

Value = float | str | None
"""A truth is 1 or 0."""
Meaning = Callable[[AnyRow], Value]

_ALIASES = {"backend.used": "backend", "backend.requested": "backend_requested"}
_TOKEN = re.compile(
    r"""\s*(?:--[^\n]*\s*)*(?:
    (?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
    |(?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")
    |(?:(?:tags|metrics|params)\.)?(?:`(?P<quoted>[^`]+)`|(?P<name>[^\W\d][\w.]*))
    |(?P<sign><=|>=|<>|!=|==|[=<>(),*/%+-])
    |(?P<end>\Z))""",
    re.VERBOSE,
)
_KEYWORDS = {"and", "or", "not", "in", "between", "like", "is", "null", "true", "false"}
_NUMBER = re.compile(r"\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?\s*", re.ASCII)
_COMPARED: dict[str, Callable[[int], bool]] = {
    "=": lambda order: order == 0,
    "==": lambda order: order == 0,
    "!=": lambda order: order != 0,
    "<>": lambda order: order != 0,
    "<": lambda order: order < 0,
    "<=": lambda order: order <= 0,
    ">": lambda order: order > 0,
    ">=": lambda order: order >= 0,
}
_COMPUTED: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "%": math.fmod,
}
_RANGES = (("keyword", "in"), ("keyword", "between"), ("keyword", "like"))
_DEEPEST = 40
"""Parentheses, signs and `not` within one another."""


class ConditionError(ValueError):
    """Says what is wrong with a condition."""


def condition(text: str, columns: Iterable[str], more: Iterable[str] = ()) -> Callable[[AnyRow], bool]:
    """Tells whether a row meets the condition. columns: what rows have; more: what they might have had. Raises
    ConditionError."""
    meaning = _Parser(text, columns, more).whole()
    return lambda row: _truth(meaning(row)) == 1


class _Parser:
    """By recursive descent: a method per rule, which reads its tokens and returns what they mean."""

    def __init__(self, text: str, columns: Iterable[str], more: Iterable[str]) -> None:
        self._there = sorted(columns)
        self._columns = {name.lower(): name for name in (*more, *self._there)}
        self._tokens = _tokens(text)
        self._place = 0
        self._depth = 0
        self._right = 0

    def whole(self) -> Meaning:
        found = self._any()
        if self._kind != "end":
            self._expected("and, or, or the end")
        return found

    def _any(self) -> Meaning:
        parts = [self._all()]
        while self._took("or"):
            parts.append(self._all())
        return parts[0] if len(parts) == 1 else lambda row: _either([_truth(part(row)) for part in parts])

    def _all(self) -> Meaning:
        parts = [self._negated()]
        while self._took("and") or self._begins_another():
            parts.append(self._negated())
        return parts[0] if len(parts) == 1 else lambda row: _both([_truth(part(row)) for part in parts])

    def _begins_another(self) -> bool:
        return self._kind in ("number", "text", "quoted", "name") or self._is("not") or self._is("(")

    def _negated(self) -> Meaning:
        if not self._took("not"):
            return self._compared()
        of = self._nested(self._negated)
        return lambda row: _opposite(_truth(of(row)))

    def _compared(self) -> Meaning:
        kind, said = self._tokens[self._place]
        if self._stands_alone(kind, said):
            self._place += 1
            return _of_trial(said) if kind == "number" else _with_words(said)
        left = self._sum()
        for sign, holds in _COMPARED.items():
            if self._took(sign):
                right = self._operands(self._sum)
                return lambda row: _compare(left(row), right(row), holds)
        if self._took("is"):
            is_not = self._took("not")
            self._need("null")
            return lambda row: float((left(row) is None) != is_not)
        is_not = self._is("not") and self._tokens[self._place + 1] in _RANGES
        self._place += is_not
        of = self._operands(lambda: self._ranged(left))
        return (lambda row: _opposite(_truth(of(row)))) if is_not else of

    def _stands_alone(self, kind: str, said: str) -> bool:
        """Whether the next token is a search: a number, a text or a word that nothing is done with."""
        if self._right or not (kind in ("number", "text") or (kind == "name" and not self._known(said))):
            return False
        following = self._tokens[self._place + 1]
        if following == ("sign", "(") and kind == "name":
            raise ConditionError(f"there is no function {said}")
        if following == ("keyword", "not"):
            return self._tokens[self._place + 2] not in _RANGES
        return following not in _RANGES and following != ("keyword", "is") and not _joins(following)

    def _ranged(self, left: Meaning) -> Meaning:
        """in, between, like, where one of them comes; else what is there already."""
        if self._took("in"):
            self._need("(")
            among = [self._sum()]
            while self._took(","):
                among.append(self._sum())
            self._need(")")
            return lambda row: _either([_compare(left(row), one(row), _COMPARED["="]) for one in among])
        if self._took("between"):
            low = self._sum()
            self._need("and")
            high = self._sum()
            return lambda row: _both(
                [_compare(left(row), low(row), _COMPARED[">="]), _compare(left(row), high(row), _COMPARED["<="])]
            )
        if self._took("like"):
            pattern = self._sum()
            return lambda row: _is_like(left(row), pattern(row))
        return left

    def _sum(self) -> Meaning:
        return self._chain(("+", "-"), lambda: self._chain(("*", "/", "%"), self._signed))

    def _chain(self, signs: Sequence[str], operand: Callable[[], Meaning]) -> Meaning:
        found = operand()
        while any(self._is(sign) for sign in signs):
            found = _computed(found, _COMPUTED[self._next()[1]], self._operands(operand))
        return found

    def _operands(self, rule: Callable[[], Meaning]) -> Meaning:
        """Where numbers and texts are values, not searches."""
        self._right += 1
        found = rule()
        self._right -= 1
        return found

    def _signed(self) -> Meaning:
        if self._took("-"):
            of = self._nested(self._signed)
            return _computed(lambda row: 0.0, operator.sub, of)
        if self._took("("):
            inner = self._nested(self._any)
            self._need(")")
            return inner
        return self._operand()

    def _operand(self) -> Meaning:
        kind, said = self._tokens[self._place]
        if kind in ("sign", "end") or (kind == "keyword" and said not in ("null", "true", "false")):
            self._expected("a column or a value")
        self._place += 1
        if kind == "keyword":
            constant = {"null": None, "true": 1.0, "false": 0.0}[said]
            return lambda row: constant
        if kind == "number":
            number = float(said)
            return lambda row: number
        if kind == "text":
            return lambda row: said
        name = self._known(said)
        if not name:
            raise ConditionError(f"no column '{said}'; there are {', '.join(self._there)}")
        return lambda row: _value(row.get(name))

    def _known(self, said: str) -> str:
        """The column of that name; "" if there is none."""
        return self._columns.get(_ALIASES.get(said.lower(), said.lower()), "")

    def _nested(self, rule: Callable[[], Meaning]) -> Meaning:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ConditionError(f"more than {_DEEPEST} parentheses or signs within one another")
        found = rule()
        self._depth -= 1
        return found

    @property
    def _kind(self) -> str:
        return self._tokens[self._place][0]

    def _is(self, said: str) -> bool:
        return self._kind in ("sign", "keyword") and self._tokens[self._place][1] == said

    def _next(self) -> tuple[str, str]:
        self._place += 1
        return self._tokens[self._place - 1]

    def _took(self, said: str) -> bool:
        is_there = self._is(said)
        self._place += is_there
        return is_there

    def _need(self, said: str) -> None:
        if not self._took(said):
            self._expected(said)

    def _expected(self, what: str) -> NoReturn:
        kind, said = self._tokens[self._place]
        raise ConditionError(f"expected {what}, found {'the end' if kind == 'end' else said}")


def _joins(token: tuple[str, str]) -> bool:
    """Whether it does something with the value before it."""
    return token[0] == "sign" and (token[1] in _COMPARED or token[1] in _COMPUTED)


def _tokens(text: str) -> list[tuple[str, str]]:
    """Kind and content of each, the last being the end. Raises ConditionError."""
    found: list[tuple[str, str]] = []
    place = 0
    while not found or found[-1][0] != "end":
        match = _TOKEN.match(text, place)
        if match is None:
            rest = text[place:].strip()
            raise ConditionError(f"a text has no end: {rest}" if rest[0] in "'\"`" else f"cannot read {rest}")
        kind = str(match.lastgroup)
        said = match[kind]
        if kind == "text":
            said = said[1:-1].replace(said[0] * 2, said[0])
        elif kind == "name" and said.lower() in _KEYWORDS:
            kind, said = "keyword", said.lower()
        found.append((kind, said))
        place = match.end()
    return found


def _value(value: object) -> Value:
    if isinstance(value, int | float):
        return float(value) if math.isfinite(value) else None
    return value if isinstance(value, str) else None


def _truth(value: Value) -> Value:
    return None if value is None else float(value != "" if isinstance(value, str) else value != 0)


def _opposite(truth: Value) -> Value:
    return None if truth is None else float(truth == 0)


def _either(truths: Sequence[Value]) -> Value:
    return 1.0 if 1.0 in truths else None if None in truths else 0.0


def _both(truths: Sequence[Value]) -> Value:
    return 0.0 if 0.0 in truths else None if None in truths else 1.0


def _compare(left: Value, right: Value, holds: Callable[[int], bool]) -> Value:
    """A text that is a number is one beside a number; any other is unequal to it, and neither more nor less."""
    if left is None or right is None:
        return None
    if isinstance(left, str) != isinstance(right, str):
        pair = [_as_number(side) for side in (left, right)]
        if None in pair:
            return float(holds(-1) and holds(1))
        left, right = pair
    return float(holds((left > right) - (left < right)))  # type: ignore[operator]


def _as_number(value: Value) -> Value:
    if isinstance(value, str):
        return float(value) if _NUMBER.fullmatch(value) else None
    return value


def _computed(left: Meaning, compute: Callable[[float, float], float], right: Meaning) -> Meaning:
    def value(row: AnyRow) -> Value:
        one, other = left(row), right(row)
        if not isinstance(one, float) or not isinstance(other, float):
            return None
        try:
            found = compute(one, other)
        except (ZeroDivisionError, ValueError):
            return None
        return found if math.isfinite(found) else None

    return value


def _is_like(value: Value, pattern: Value) -> Value:
    """`%` is anything, `_` any character; case does not matter."""
    if not isinstance(value, str) or not isinstance(pattern, str):
        return None
    parts = ({"%": ".*", "_": "."}.get(letter, re.escape(letter)) for letter in pattern.lower())
    return float(re.fullmatch("".join(parts), value.lower(), re.DOTALL) is not None)


def _of_trial(number: str) -> Meaning:
    return lambda row: _compare(_value(row.get("trial")), float(number), _COMPARED["="])


def _with_words(said: str) -> Meaning:
    wanted = _words(said)
    return lambda row: float(any(wanted in _words(value) for value in row.values() if isinstance(value, str)))


def _words(text: str) -> str:
    """With a blank before and after each, in lower case."""
    words = " ".join(re.findall(r"\w+", text.lower()))
    return f" {words} "
