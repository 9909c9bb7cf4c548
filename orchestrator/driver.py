"""The driver: asks the study, starts the plans of its trials, tells what came of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Protocol

from search_spaces import SearchSpace
from streamllm.errors import UsageError
from streamllm.results.schema import OBJECTIVES, Row, told_name
from streamllm.results.study import BASELINE, HARDLY, STRICT
from streamllm.results.study_folder import Completeness

from .scheduler import Scheduler
from .search.rows import failed_row, fixed_configuration, fixed_row, increases, quality_row, trial_row
from .search.sampling import BaselineSample
from .search.study import Look, OpenTrial, Study
from .search.tasks import with_tasks
from .unwritable import writing
from .waiting import JobError
from .workers.messages import Subject, SweepError, Variant

if TYPE_CHECKING:
    import numpy as np

    from streamllm.configuration import Configuration
    from streamllm.measuring.done import Done
    from streamllm.measuring.jobs import More, Plan, TaskAsked
    from streamllm.measuring.plans import Evaluated
    from streamllm.measuring.quality import QualityComparison
    from streamllm.measuring.text import TokenStream

_MATTERS = 0.01
"""A share of the hypervolume that is worth more timings, where nobody says."""
_CANDIDATES = 5
"""Taken to be confirmed, when time is set aside for it."""
_OF_BASELINE = {"speedup", "ppl_increase_percent"}
_OF_RECOMPUTATION = {name for name in OBJECTIVES if "_vs_recompute" in name}


class Observer(Protocol):
    """Is told of results: the file of trials, the display, MLflow."""

    def trial_finished(self, row: Row) -> None: ...


class Driver:
    def __init__(
        self,
        study: Study,
        scheduler: Scheduler,
        text: TokenStream,
        variant: Variant,
        trials: int,
        observers: list[Observer],
        note: Callable[[str], None] = lambda _: None,
        *,
        until: float = math.inf,
        confirm: int = 0,
        baseline_tokens: int | None = None,
        tasks: Sequence[TaskAsked] = (),
        complete_to: float | None = None,
    ) -> None:
        """variant: the model of all that a space does not quantize by itself, and of the reference; `until`: when all
        should be finished, by the monotonic clock; `confirm`: rounds that will come after the search, and need their
        time. `baseline_tokens`: see `BaselineSample.wanted`; tasks: that trials and the reference are put
        to; complete_to: nothing more is asked for when what is left would hardly add so large a share of the
        hypervolume. Raises UsageError for a study of another text."""
        self.study = study
        self.scheduler = scheduler
        self.observers = observers
        self.note = note
        self.fixed: dict[str, Evaluated] = {}
        """Results that trials are compared with, as far as they are known."""
        self._is_fixing = False
        """Whether they are being measured, or have been."""
        self._reference: np.ndarray | None = None
        """The losses of strict StreamingLLM."""
        self.comparison: QualityComparison | None = None
        """Compares qualities, once the reference is measured; includes the baseline's as far as that has been
        measured."""
        self._text = text
        self.subject = Subject(text.digest, variant, study.cap)
        self._budget = trials - len(study.rows)
        self._until = until
        self._confirm = confirm
        self._exhausted = False
        self._complete_to = complete_to
        self._is_complete = False
        self._open = 0
        """Trials, and batches of the baseline's sample, that are being measured."""
        self._grows = True
        """Whether the sample is being measured."""
        self._sample = BaselineSample(baseline_tokens)
        self._parts: list[Done] = []
        """Of the baseline's sample."""
        self._awaits_baseline = bool(_OF_BASELINE & {*map(told_name, study.space.objectives), *_limited(study.space)})
        self._unpaired: list[tuple[OpenTrial, Evaluated]] = []
        """Measured before what they are compared with."""
        self._tasks = tasks
        self._check_text()
        scheduler.share(text)

    def _check_text(self) -> None:
        """A study is of one text. Raises UsageError."""
        known = next((row["text_digest"] for row in self.study.rows if "text_digest" in row), self._text.digest)
        if known != self._text.digest:
            raise UsageError(
                f"text {self._text.label!r}: {self._text.digest:.12}..., the study's is {known:.12}...; its files have "
                f"been changed; put them back, or give another --study"
            )

    def run(self) -> None:
        """Runs trials until the budget is spent or the space is exhausted. Raises SweepError, UsageError."""
        from streamllm.measuring import plans

        if self._awaits_baseline or self.study.rows or not self._more():
            self._start_fixed()
        else:
            self.scheduler.start(plans.strict(self.study.cap), self.subject, self._reference_known)
        self._search()
        self._announce_fixed(BASELINE)

    def _start_fixed(self) -> None:
        """The reference and the baseline. In a new study, of which somebody wants to see something, they come after the
        first trial, unless trials wait for their times."""
        if self._is_fixing:
            return
        from streamllm.measuring import plans

        self._is_fixing = True
        strict, recomputing = (fixed_configuration(name, self.study.cap) for name in (STRICT, BASELINE))
        self.scheduler.start(self._with_tasks(strict), self.subject, partial(self._fixed, STRICT))
        baseline = plans.with_more(self._baseline(), recomputing, self._more_kinds)
        self.scheduler.start(baseline, self.subject, partial(self._fixed, BASELINE))

    def goes_on(self) -> bool:
        """Searches on where trials that were timed again leave more to find than was asked for. Returns whether they
        did."""
        self._is_complete = False
        self._see_what_is_left()
        if self._complete_to is None or not self._more():
            return False
        self._search()
        return True

    def _search(self) -> None:
        while not self._is_fixing or self.scheduler.is_working or self._more() or self._is_short():
            self.scheduler.step()
            self._fill()

    def increases(self, losses_of: Callable[[str], np.ndarray]) -> list[Row]:
        """The cost of the finished trials and the reference beside the baseline, as well as it is known by now. See
        `rows.increases`."""
        if self.comparison is None or not {STRICT, BASELINE} <= self.fixed.keys():
            return []
        strict = fixed_row(STRICT, self.study.cap, self.fixed[STRICT], None, self.comparison)
        return increases([strict, *self.study.rows], self.comparison, losses_of)

    def completeness(self) -> Completeness | None:
        """How probable it is that there is more to find; None if the sampler cannot tell."""
        share = self._complete_to or _MATTERS
        chance = self.study.chance_of(share)
        if chance is None:
            return None
        return {"share": share, "chance": chance, "timed": len(self.study.rows), "points": self.study.space.size}

    def _fill(self) -> None:
        """Starts trials, and batches of the baseline's sample, as long as some worker has nothing to do."""
        while self.scheduler.has_idle and self._open < self.scheduler.ready and self._start_next():
            self.scheduler.assign()
        if not self._open and not self._more():  # nothing that they could come after
            self._start_fixed()

    def _start_next(self) -> bool:
        """Whether there was anything to start."""
        grows = self.comparison is not None and BASELINE in self.fixed and not self._grows and self._has_time()
        if self._more():
            if grows and self._sample.is_due():
                return self._grow()
            what = self._ask()
            if isinstance(what, Look):
                self._look(what)
                return True
            if what is not None:
                self._budget -= 1
                self._start(what)
                return True
            self._exhausted = True
        return grows and self._sample.is_short() and self._grow()

    def _start(self, trial: OpenTrial) -> None:
        plan = self._with_tasks(trial.configuration)
        self._open += 1
        self.scheduler.start(plan, self.subject, partial(self._measured, trial), partial(self._died, trial.number))

    def _look(self, look: Look) -> None:
        from streamllm.measuring import plans

        plan = plans.fast_quality(look.configuration, self._text, self.study.cap, self._batches)
        self._open += 1
        self.scheduler.start(plan, self.subject, partial(self._looked, look))

    def _looked(self, look: Look, result: Evaluated | JobError) -> None:
        self._open -= 1
        self._start_fixed()
        if isinstance(result, JobError):
            self.note(f"warning: nothing with the policy {look.configuration.policy} is tried: {result}")
            self.study.looked(look, Row())
            return
        self._sample.spent(result.seconds, on_it=False)
        assert self.comparison is not None
        known = quality_row(look.configuration, result, self.comparison, beside_baseline=BASELINE in self.fixed)
        self.study.looked(look, known)
        self._see_what_is_left()

    def _with_tasks(self, what: Configuration) -> Plan[Evaluated]:
        """Quality, speed, what else is asked for, and the scores of tasks."""
        from streamllm.measuring import plans

        fast = plans.fast(what, self._text, total=self.study.cap, recomputed=self._batches)
        return with_tasks(plans.with_more(fast, what, self._more_kinds), what, self._tasks, self.study.space.scores)

    @property
    def _more_kinds(self) -> list[More]:
        """The jobs besides quality and speed that the search goes by."""
        from streamllm.measuring import plans

        return plans.more_for(self.study.space.measures)

    @property
    def _batches(self) -> int:
        """Of re-computation's sample, that predictions are compared with where the search goes by that: as many as
        every sample has."""
        from streamllm.measuring import plans

        if not _OF_RECOMPUTATION & {*self.study.space.measures}:
            return 0
        tokens = self._sample.least or len(self._text.tokens)
        return plans.comparable_batches(tokens, self.study.cap, self._text)

    def _baseline(self) -> Plan[Evaluated]:
        """With a sample of a batch; where trials wait for it, with all the tokens that are needed."""
        from streamllm.measuring import plans
        from streamllm.measuring.jobs import Job
        from streamllm.measuring.sample import BATCH, FixedSize

        what = fixed_configuration(BASELINE, self.study.cap)
        size = FixedSize((self._sample.least or len(self._text.tokens)) if self._awaits_baseline else BATCH)
        self._parts = yield from plans.sample(what, self._text, size)
        (speed,) = yield [Job("speed", what)]
        return plans.with_speed(plans.joined(what, self._parts), speed)

    def _grow(self) -> bool:
        """Whether there is a batch more."""
        from streamllm.measuring import plans

        what, known = fixed_configuration(BASELINE, self.study.cap), len(self._parts)
        last = min(plans.batches_of(what, self._text), known + self._sample.next_batches)
        if last == known:
            self._sample.is_whole = True
            return False

        def batches() -> Plan[Evaluated]:
            self._parts += yield [plans.batch(what, number) for number in range(known, last)]
            return plans.grown(self.fixed[BASELINE], plans.joined(what, self._parts))

        self._grows = True
        self._open += 1
        self.scheduler.start(batches(), self.subject, self._grown)
        return True

    def _is_short(self) -> bool:
        return self._sample.is_short() and self._has_time()

    def _more(self) -> bool:
        """Whether there is anything new to ask for, be there workers just now or not."""
        return self._budget > 0 and not self._exhausted and not self._is_complete and self._has_time()

    def _has_time(self) -> bool:
        """For one trial more on every worker, and for confirming what is on the front by then."""
        if self._until == math.inf:
            return True
        rows = [row for row in self.study.rows if "speed_sec" in row]
        speed = median(row["speed_sec"] for row in rows) if rows else 0.0
        quality = median(row["quality_sec"] for row in rows) if rows else 0.0
        baseline = self.fixed[BASELINE].record.get("speed_sec", 0.0) if BASELINE in self.fixed else 0.0
        needed = quality + self.scheduler.timed_in_turn * speed + self._confirm * (_CANDIDATES * speed + baseline)
        return time.monotonic() + needed < self._until

    def _fixed(self, name: str, result: Evaluated | JobError) -> None:
        result = _indispensable(name, result)
        if name == BASELINE:
            self._grows = False
        self._know(name, result)
        if self.comparison is not None:
            self._announce_fixed(name)
        self._tell_paired()

    def _reference_known(self, result: Evaluated | JobError) -> None:
        """Its quality: all that trials wait for."""
        known = _indispensable(STRICT, result)
        self._sample.spent(known.seconds, on_it=False)
        self._compare_with(known.losses)
        self._tell_paired()

    def _grown(self, result: Evaluated | JobError) -> None:
        self._open -= 1
        self._grows = False
        if isinstance(result, JobError):  # there is a sample, if a small one
            self.note(f"warning: the baseline's sample stays at {self._sample.tokens} tokens: {result}")
            self._sample.is_whole = True
            return
        self._know(BASELINE, result)

    def _know(self, name: str, result: Evaluated) -> None:
        """What trials are compared with, and how."""
        self.fixed[name] = result
        self.scheduler.keep(result)
        self._sample.spent(result.seconds, on_it=name == BASELINE)
        reference = result.losses if name == STRICT else self._reference
        if reference is not None:
            self._compare_with(reference)

    def _compare_with(self, reference: np.ndarray) -> None:
        from streamllm.measuring.quality import QualityComparison

        baseline = self.fixed.get(BASELINE)
        self._reference = reference
        self.comparison = QualityComparison(reference, baseline.losses if baseline else None)
        if baseline is not None:
            self._sample.measured(baseline.losses, reference)

    def _announce_fixed(self, name: str) -> None:
        assert self.comparison is not None
        row = fixed_row(name, self.study.cap, self.fixed[name], self.fixed.get(BASELINE), self.comparison)
        self._announce(row | self._measured_by(self.fixed[name]))

    def _measured_by(self, evaluated: Evaluated) -> dict[str, object]:
        """Nobody, where the store had all of it."""
        if not evaluated.is_fresh:
            return {}
        return {"worker": evaluated.worker, "host": self.scheduler.host_of(evaluated.worker)}

    def _measured(self, trial: OpenTrial, result: Evaluated | JobError) -> None:
        self._open -= 1
        if isinstance(result, JobError):
            self._tell(trial, failed_row(trial, str(result)))
            return
        self.scheduler.keep(result)
        self._sample.spent(result.seconds, on_it=False)
        self._unpaired.append((trial, result))
        self._tell_paired()

    def _tell_paired(self) -> None:
        baseline = self.fixed.get(BASELINE)
        if self.comparison is None or (baseline is None and self._awaits_baseline):
            return
        waiting, self._unpaired = self._unpaired, []
        of_baseline = None if baseline is None else fixed_row(BASELINE, self.study.cap, baseline, None, self.comparison)
        for trial, result in waiting:
            row = trial_row(trial, result, of_baseline, self.comparison)
            self._tell(trial, row | self._measured_by(result))

    def _died(self, number: int) -> int:
        """How many workers have ended on a trial, this one included."""
        with writing():
            return self.study.died(number)

    def _ask(self) -> OpenTrial | Look | None:
        """A quality alone is of use when it is known what it is compared with."""
        is_comparable = self.comparison is not None and (BASELINE in self.fixed or not self._awaits_baseline)
        with writing():
            return self.study.ask(may_look=is_comparable)

    def _tell(self, trial: OpenTrial, row: Row) -> None:
        with writing():
            judged = self.study.tell(trial.number, row)
        self._announce(judged)
        self._start_fixed()
        self._see_what_is_left()

    def _see_what_is_left(self) -> None:
        if self._complete_to is not None and not self._is_complete:
            chance = self.study.chance_of(self._complete_to)
            self._is_complete = chance is not None and chance < HARDLY

    def _announce(self, row: Row) -> None:
        with writing():
            for observer in self.observers:
                observer.trial_finished(row)


def _indispensable(name: str, result: Evaluated | JobError) -> Evaluated:
    """Raises SweepError where there is none."""
    if isinstance(result, JobError):
        what = {STRICT: "strict StreamingLLM, the reference,", BASELINE: "the baseline"}[name]
        raise SweepError(f"{what} could not be measured: {result}")
    return result


def _limited(space: SearchSpace) -> list[str]:
    return [constraint.metric for constraint in space.constraints]
