"""A pool whose one worker is real and measures in this process, without Ray."""

from orchestrator.workers.pool import Finished
from orchestrator.workers.worker import Worker
from streamllm.errors import UnavailableError, UnsupportedModelError, one_line


class LocalPool:
    def __init__(self, setup, settings, *, note=print):
        self._worker = Worker(setup, 1, "this test")
        self._worker._claim = self._claim
        self._texts = {}
        self._lent = {}
        self._ready = [Finished(0, description=self._worker.load())]

    def _claim(self, *_):
        self._worker.cores = []
        return []

    def share(self, text):
        self._texts[text.digest] = text

    def lend(self, names, arrays):
        self._lent[names] = [arrays(name) for name in names]

    def submit(self, worker, assignment):
        text, against = self._texts[assignment.subject.text], self._lent.get(assignment.job.against, ())
        self._answer(lambda: {"measurement": self._worker.measure(assignment, text, against)})

    def ask_conditions(self, worker, variant):
        self._answer(lambda: {"conditions": self._worker.conditions(variant)})

    def wait(self, timeout):
        ready, self._ready = self._ready, []
        yield from ready

    def shutdown(self):
        pass

    def _answer(self, do):
        try:
            self._ready.append(Finished(0, **do()))
        except Exception as error:
            unavailable = isinstance(error, UnavailableError | UnsupportedModelError)
            said = str(error) if unavailable else one_line(error)
            self._ready.append(Finished(0, error=said, unavailable=unavailable))
