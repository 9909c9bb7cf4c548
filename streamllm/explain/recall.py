"""What a cache forgets: questions all along a stream for what it said earlier, answered without decoding.

A stream of a task (`tasks.texts`) is tokenized once, the true answers included; `measuring.hits` says why the likeliest
tokens at the places of an answer tell whether greedy decoding would have given it. A chat model gets its turns as its
template has them. An answer counts if it comes token by token as the tokenizer splits it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from ..measuring.text import TokenStream
from ..policy import EvictionPolicy, evicted_before, prune_starts
from ..tasks.texts import Turn, stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""The first, and the one behind the last."""
_Z = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Question:
    answer: Span
    """Tokens of the stream."""
    needles: tuple[Span, ...]
    """Tokens of all that has to be remembered for it, in their order."""

    @property
    def distance(self) -> int:
        """Tokens from the beginning of what has to be remembered to the answer."""
        return self.answer[0] - self.needles[0][0]


@dataclass(frozen=True, slots=True)
class AskedStream:
    task: str
    stream: TokenStream
    questions: tuple[Question, ...]


def asked_stream(task: str, length: int, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> AskedStream:
    """At most `length` tokens. Raises UsageError for a tokenizer that cannot say where its tokens are in a text, a
    template that changes what is said, and a length in which nothing is asked."""
    if not tokenizer.is_fast:
        raise UsageError(f"model {tokenizer.name_or_path!r}: its tokenizer is not one of the `tokenizers` library")

    def size(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    turns = stream(task, length, seed, size)
    text, is_chat = rendered(turns, tokenizer)
    encoded = tokenizer(text, add_special_tokens=not is_chat, return_offsets_mapping=True, verbose=False)
    tokens = np.array(encoded["input_ids"][:length], dtype=np.int64)
    found = _questions(text, turns, encoded["offset_mapping"])
    questions = tuple(question for question in found if question.answer[1] <= len(tokens))
    if not questions:
        raise UsageError(f"length {length}: no question of task {task!r} fits into so many tokens; give more")
    digest = hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()
    return AskedStream(task, TokenStream(tokens, f"recall-{task}", digest), questions)


def rendered(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """The whole stream, and whether it is a chat."""
    if not tokenizer.chat_template:
        parts = (
            f"{turn.text}\nQuestion: {turn.fact.question}\nAnswer: {turn.fact.lead} {turn.fact.answer}.\n\n"
            for turn in turns
        )
        return "".join(parts), False
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": f"{turn.text}\n{turn.fact.question}"})
        messages.append({"role": "assistant", "content": f"{turn.fact.lead} {turn.fact.answer}."})
    return str(tokenizer.apply_chat_template(messages, tokenize=False)), True


def _questions(text: str, turns: Sequence[Turn], offsets: Sequence[Span]) -> list[Question]:
    """offsets: of each token in the text."""
    ends = np.array(offsets).reshape(-1, 2)
    starts, stops = np.maximum.accumulate(ends).T  # what the tokenizer adds is nowhere in the text

    def tokens(start: int, stop: int) -> Span:
        return int(np.searchsorted(stops, start, side="right")), int(np.searchsorted(starts, stop, side="left"))

    found, reached = [], 0
    for turn in turns:
        fact = turn.fact
        answer = f"{fact.lead} {fact.answer}"
        needles = [text.find(needle) for needle in fact.needles]
        asked_at = text.find(fact.question, reached)
        reached = text.find(answer, asked_at) if asked_at >= 0 else -1  # the fact may be in the same words
        if reached < 0 or min(needles) < 0 or max(needles) > reached:
            raise UsageError(f"answer {answer!r}: is not in the text as the model's chat template has it; use another")
        reached += len(answer)
        spans = [tokens(at, at + len(needle)) for at, needle in zip(needles, fact.needles, strict=True)]
        found.append(Question(tokens(reached - len(fact.answer) - 1, reached), tuple(spans)))
    return found


def answers(asked: AskedStream, table: np.ndarray, policy: EvictionPolicy) -> list[dict[str, Any]]:
    """A record per question. table (n, 3): `losses_and_hits` of the stream under the policy."""
    evicted = evicted_before(policy, len(table))
    records = []
    for question in asked.questions:
        start, stop = question.answer
        of_answer = table[start - 1 : stop - 1]  # the queries before its tokens
        oldest = policy.n_sink + evicted[stop - 2]
        seen = [_seen(needle, policy.n_sink, oldest) for needle in question.needles]
        records.append(
            {
                "distance": question.distance,
                "place": question.needles[0][0],
                "answered_at": start,
                "exact": bool(of_answer[:, 2].all()),
                "answer_loss": float(of_answer[:, 1].sum()),
                "cached": min(seen),
            }
        )
    return records


def _seen(needle: Span, n_sink: int, oldest: int) -> float:
    """The share of its tokens that the answer's last token can still attend to."""
    kept = np.arange(*needle)
    return float(((kept < n_sink) | (kept >= oldest)).mean())


def by_octave(records: Sequence[Mapping[str, Any]], of: str = "distance") -> list[dict[str, Any]]:
    """A record for each octave that there are questions in, ascending. of: distance, or place in the stream."""
    octaves = np.array([int(math.log2(max(record[of], 1))) for record in records])
    return [
        {"from": 2**octave, "to": 2 ** (octave + 1) - 1}
        | summary([record for record, its in zip(records, octaves, strict=True) if its == octave])
        for octave in map(int, np.unique(octaves))
    ]


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Recall with its 95% interval, by Wilson (1927), the mean loss of an answer in nats, and how many of the
    questions were about what the cache still had."""
    right, n = sum(record["exact"] for record in records), len(records)
    low, high = wilson(right, n)
    return {
        "questions": n,
        **{f"mean_{of}": _middle([record[of] for record in records]) for of in ("distance", "place")},
        "recall": right / n,
        "recall_low": low,
        "recall_high": high,
        "answer_loss": float(np.mean([record["answer_loss"] for record in records])),
        "cached": float(np.mean([record["cached"] == 1 for record in records])),
    }


def _middle(values: Sequence[int]) -> float:
    """The geometric mean."""
    return float(np.exp(np.log(np.maximum(values, 1)).mean()))


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share, of which `right` in n were seen."""
    share, z2 = right / n, _Z**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def by_position(losses: np.ndarray, parts: int = 16) -> list[dict[str, Any]]:
    """Perplexity along a text, part by part. losses (n, 2): position, nats."""
    pieces = [piece for piece in np.array_split(losses, parts) if len(piece)]
    return [
        {"from": int(piece[0, 0]) + 1, "to": int(piece[-1, 0]) + 1, "perplexity": float(np.exp(piece[:, 1].mean()))}
        for piece in pieces
    ]


def prunes_apart(policy: EvictionPolicy, n_losses: int) -> bool:
    """Whether there are tokens between prunes."""
    starts = prune_starts(policy, n_losses)
    return len(starts) > 1 and bool(max(np.diff(starts)) > 1)


def after_prunes(losses: np.ndarray, reference: np.ndarray, policy: EvictionPolicy) -> list[dict[str, Any]]:
    """The mean loss above a reference's by tokens since the last prune, octave by octave. Both (n, 2): position,
    nats."""
    from .diagnosis import token_table

    table = token_table(policy, losses[:, 1], reference[:, 1])
    table = table[table["since_prune"].notna()]
    since = table["since_prune"].to_numpy(dtype=np.int64)
    octaves, excess = np.floor(np.log2(since + 1)).astype(int), table["excess"].to_numpy()
    return [
        {"from": 2**octave - 1, "to": 2 ** (octave + 1) - 2, "excess_nats": float(excess[octaves == octave].mean())}
        for octave in map(int, np.unique(octaves))
    ]
