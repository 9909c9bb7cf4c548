"""The texts: facts among other text, and questions for them. Plain Python; a seed gives the same text everywhere.

A task is an endless stream of pieces, some of which state a fact. A question names its fact, and is asked when that is
about so far back as wanted. What was asked is not asked again, as the answer stands in the text from then on; facts
that do change (`recent`) may be, once they have changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random

Size = Callable[[str], int]
"""Tokens of a text, about."""


@dataclass(frozen=True, slots=True)
class Fact:
    key: str
    """What it is about: a later fact about the same takes its place."""
    needles: tuple[str, ...]
    """All that has to be remembered, in the words of the text; each stands there once."""
    question: str
    lead: str
    """How the answer begins: given, so that what follows is forced."""
    answer: str


@dataclass(frozen=True, slots=True)
class Turn:
    """Some text, and a question about what has been said so far."""

    text: str
    fact: Fact


Pieces = Iterator[tuple[str, Fact | None]]
"""Text without end, sentence by sentence or line by line, and what a piece states."""


@dataclass(frozen=True, slots=True)
class Task:
    about: str
    intro: str
    pieces: Callable[[Random], Pieces]
    asked: str = "at a distance"
    """Which fact is asked for: the one nearest to a wanted distance; the last; or one of the first."""


FIRST = 40
"""Facts at the beginning of a stream whose first ones are asked for."""


def words(text: str) -> int:
    """A size that needs no tokenizer: words, signs and single digits."""
    return len(re.findall(r"\d|[^\W\d]+|[^\w\s]", text))


def stream(name: str, length: int, seed: int, size: Size = words, every: int = 96) -> list[Turn]:
    """Turns of about `length` tokens together, with a question after every `every` tokens of text: distances are in
    turn the powers of two from 32 to half the length. size: counts tokens."""
    task, random = TASKS[name], Random(f"{name} {seed}")
    goals = [2**power for power in range(5, 30) if 2**power <= length // 2] or [length // 2]
    text, position, held, turns = task.intro, size(task.intro), {}, []  # type: ignore[var-annotated]
    until = length // 2 if task.asked == "first" else every
    for piece, fact in task.pieces(random):
        text += piece
        if fact is not None:
            held[fact.key] = fact, position
        position += size(piece)
        if position > length:
            return turns
        if position < until or not held:
            continue
        fact = _chosen(task, held, position, [goal for goal in goals if goal <= position] or goals[:1], random)
        del held[fact.key]
        turns.append(Turn(text, fact))
        text = ""
        position += size(f"{fact.question} {fact.lead} {fact.answer}.")
        until = position + every
    raise AssertionError("unreachable: pieces have no end")


def question_at(name: str, distance: int, seed: int, size: Size = words) -> Turn:
    """One text with one question at its end, for a fact that is about `distance` tokens back; of `last`, as far back as
    it comes, and of `first`, in a text of that length."""
    task, random = TASKS[name], Random(f"{name} {distance} {seed}")
    before = size(task.intro) + distance // 4 + 64
    text, position, held = task.intro, size(task.intro), {}  # type: ignore[var-annotated]
    for piece, fact in task.pieces(random):
        text += piece
        if fact is not None:
            held[fact.key] = fact, position
        position += size(piece)
        if position >= before + distance and held:
            return Turn(text, _chosen(task, held, position, [distance], random))
    raise AssertionError("unreachable: pieces have no end")


def _chosen(task: Task, held: dict[str, tuple[Fact, int]], position: int, goals: Sequence[int], random: Random) -> Fact:
    if task.asked == "first":
        return random.choice([fact for fact, _ in held.values()])
    if task.asked == "last":
        return max(held.values(), key=lambda known: known[1])[0]
    goal = random.choice(goals)
    return min(held.values(), key=lambda known: abs(position - known[1] - goal))[0]


def _passkeys(random: Random) -> Pieces:
    """Few of them, in prose."""
    names, numbers = _names(random), _numbers(random)
    while True:
        for _ in range(random.randint(2, 6)):
            yield f"{random.choice(_SENTENCES)} ", None
        name, number = next(names), next(numbers)
        said = f"The pass key of the {name} is {number}."
        yield f"{said} ", _asked(name, f"pass key of the {name}", number, said)


def _keys(random: Random) -> Pieces:
    """Nothing but keys."""
    names, numbers = _names(random), _numbers(random)
    while True:
        name, number = next(names), next(numbers)
        said = f"{name}: {number}"
        yield f"{said}\n", _asked(name, f"number of the {name}", number, said)


def _lines(random: Random) -> Pieces:
    """As StreamEval's, which are LongEval's."""
    numbers = _numbers(random)
    for line in count(1):
        number = f"<{next(numbers)}>"
        said = f"line {line}: REGISTER_CONTENT is {number}"
        yield f"{said}\n", _asked(f"line {line}", f"REGISTER_CONTENT in line {line}", number, said)


def _first(random: Random) -> Pieces:
    keys = _keys(random)
    for _ in range(FIRST):
        yield next(keys)
    while True:
        yield f"{random.choice(_SENTENCES)} ", None


def _last(random: Random) -> Pieces:
    """Numbers with more or less text between them."""
    numbers = _numbers(random)
    while True:
        number = next(numbers)
        said = f"A new number was drawn, and it is {number}."
        yield f"{said} ", _asked("drawn", "number that was drawn last", number, said)
        for _ in range(round(2 ** random.uniform(0, 6))):
            yield f"{random.choice(_SENTENCES)} ", None


def _recent(random: Random) -> Pieces:
    """A few things that change over and over, each half as often as the one before."""
    numbers = _numbers(random)
    chances = [0.5**place for place in range(len(_SHIPS))]
    for day in count(1):
        (ship,) = random.choices(_SHIPS, chances)
        number = next(numbers)
        said = f"Day {day}: the {ship} is at berth {number}."
        yield f"{said}\n", _asked(ship, f"berth of the {ship} by now", number, said)


def _variables(random: Random) -> Pieces:
    """Chains of two assignments, which both have to be remembered."""
    numbers, names = _numbers(random), _letters(random)
    while True:
        first, second, number = next(names), next(names), next(numbers)
        said = f"VAR {first} = {number}", f"VAR {second} = VAR {first}"
        yield f"{said[0]}\n", None
        yield f"{said[1]}\n", _asked(second, f"value of VAR {second}", number, *said)


def _asked(key: str, what: str, answer: str, *needles: str) -> Fact:
    return Fact(key, needles, f"What is the {what}?", f"The {what} is", answer)


def _numbers(random: Random) -> Iterator[str]:
    """Each of them once."""
    yield from map(str, random.sample(range(10_000, 100_000), 90_000))


def _names(random: Random) -> Iterator[str]:
    names = [f"{adjective} {noun}" for adjective in _ADJECTIVES for noun in _NOUNS]
    random.shuffle(names)
    yield from names
    for number in count(2):
        yield from (f"{name} of street {number}" for name in names)


def _letters(random: Random) -> Iterator[str]:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names = [a + b + c for a in alphabet for b in alphabet for c in alphabet]
    random.shuffle(names)
    yield from names
    for number in count(2):
        yield from (f"{name}_{number}" for name in names)


TASKS = {
    "passkey": Task(
        "a few pass keys in prose", "Remember the pass keys in this text; I will ask for them.\n", _passkeys
    ),
    "keys": Task("a key among many", "Remember this list of numbers; I will ask for them.\n", _keys),
    "first": Task(
        "the first of a long stream",
        "Remember this list of numbers; I will ask for them much later.\n",
        _first,
        "first",
    ),
    "last": Task("the newest of a stream", "Remember the number that was drawn last.\n", _last, "last"),
    "recent": Task("the last state of things that change", "Remember where each ship is now.\n", _recent),
    "lines": Task(
        "lines asked back, as in StreamEval", "Remember the content of every line; I will ask for it.\n", _lines
    ),
    "variables": Task("a variable's value through another", "Remember the value of every variable.\n", _variables),
}
"""By name, in the order they are shown."""

_ADJECTIVES = (
    "red", "blue", "green", "yellow", "black", "white", "brown", "grey", "old", "new", "small", "large", "tall", "low",
    "quiet", "loud", "warm", "cold", "dry", "wet", "round", "narrow", "wide", "broken", "hidden", "empty", "open",
    "golden", "silver", "wooden",
)  # fmt: skip
_NOUNS = (
    "house", "door", "garden", "tower", "bridge", "station", "school", "market", "barn", "boat", "cabin", "castle",
    "church", "cellar", "factory", "farm", "hotel", "library", "mill", "museum", "office", "palace", "park", "room",
    "shop", "stable", "studio", "temple", "theater", "well",
)  # fmt: skip
_SHIPS = ("Aurora", "Beagle", "Cygnus", "Dolphin", "Endeavour", "Fram", "Galatea", "Hector", "Iris", "Juno")
_SENTENCES = (
    "The grass is green and the sky is blue.",
    "In the morning a light wind came from the sea.",
    "Nobody in the village could say when the bridge was built.",
    "A good meal takes time, and so does a good story.",
    "The children played by the river until it was dark.",
    "She put the letter on the table and left the room.",
    "Most of the books on the upper shelf were about birds.",
    "It had rained for days, and the roads were soft.",
    "He liked to sit at the window with a cup of tea.",
    "The train was late again, but nobody complained.",
    "On Sundays the market was full of people from the hills.",
    "An old clock in the hall struck the hour.",
    "They walked along the wall and talked about the weather.",
    "The baker opened his shop before the sun came up.",
    "From the top of the hill one could see both lakes.",
    "Someone had left a bicycle at the corner of the street.",
    "The cat slept on the warm stones in front of the door.",
    "Every spring the river rises and covers the meadows.",
    "The musicians tuned their instruments and waited.",
    "A narrow path leads through the forest to the mill.",
    "The teacher wrote a long sentence on the board.",
    "There was bread and cheese, and some apples too.",
    "The lamp on the ship could be seen from far away.",
    "Later they agreed that it had been a good year.",
)
