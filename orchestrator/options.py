"""A sweep's options that are chosen by name, without the libraries that implement them."""

from __future__ import annotations

from streamllm.options import Lazy

SAMPLERS: dict[str, Lazy | None] = {
    "auto": None,
    "front": None,
    "tpe": Lazy("orchestrator.search.samplers:tpe"),
    "nsga2": Lazy("orchestrator.search.samplers:nsga2"),
    "gp": Lazy("orchestrator.search.samplers:gp"),
    "qmc": Lazy("orchestrator.search.samplers:qmc"),
    "random": None,
    "grid": None,
}
"""Optuna's, but for `front`, which is made for this search (`search.front_sampler`), `auto`, which begins with it, and
two that remember nothing: `random` draws, `grid` takes the points of a space in their order."""
TIMINGS = ("auto", "exclusive", "concurrent")
"""Whether accelerators of one node are timed one at a time or side by side; `auto`: as they are found to disturb one
another."""
AUTO_FRONT_TRIALS = 150
"""`auto` is front for so many trials, by which it has found what there is in spaces that were measured, then nsga2: an
ask costs front tens of milliseconds and more with every trial; nsga2 beats random from 32 trials on, at a flat cost
(tests/benchmarks/samplers.py)."""
USUAL_UNTIL_TIMINGS = 52
"""Of `--until 0.01`: the median of fifteen searches of a measured space of 1,008 configurations, 48 to 64
(tests/benchmarks/samplers.py)."""
