"""What the task files of this folder name: their documents, and what the harness makes of an answer.

The harness loads it by its place, without a package around it. `--metadata '{"distances": [64, 4096], "questions": 20,
"seed": 1}'` says other distances (tokens, by the words and digits of a text), how many questions at each, and a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from streamllm.tasks.texts import TASKS, question_at

if TYPE_CHECKING:
    from datasets import Dataset

_DISTANCES = (64, 256, 1024, 4096)
_QUESTIONS = 16


def documents(
    task: str, distances: Sequence[int] = _DISTANCES, questions: int = _QUESTIONS, seed: int = 0, **_: Any
) -> dict[str, Dataset]:
    """One text with one question each. The harness gives much else too, the model's name for one."""
    from datasets import Dataset

    found = []
    for distance in distances:
        for number in range(questions):
            turn = question_at(task, distance, seed * questions + number)
            fact = turn.fact
            found.append(
                {
                    "text": turn.text,
                    "question": fact.question,
                    "lead": fact.lead,
                    "answer": fact.answer,
                    "distance": distance,
                }
            )
    return {"test": Dataset.from_list(found)}


passkey, keys, first, last, recent, lines, variables = (partial(documents, task) for task in TASKS)


def process_results(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Of a log-likelihood: whether greedy decoding would have said just this answer, and the answer's nats."""
    ((likelihood, is_greedy),) = results
    return {"exact_match": float(is_greedy), "answer_loss": -float(likelihood)}
