"""A sweep's options that are chosen by name, without the libraries that implement them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamllm.options import Lazy

if TYPE_CHECKING:
    from .search.samplers import SamplerMaker

SAMPLERS: dict[str, Lazy[SamplerMaker] | None] = {
    "auto": None,
    "front": None,
    "tpe": Lazy("orchestrator.search.samplers:tpe"),
    "nsga2": Lazy("orchestrator.search.samplers:nsga2"),
    "gp": Lazy("orchestrator.search.samplers:gp"),
    "qmc": Lazy("orchestrator.search.samplers:qmc"),
    "random": None,
    "grid": None,
}
"""Optuna's, but for `front`, which is made for this search (`search.front_sampler`), and two that remember nothing:
`random` draws, `grid` takes the points of a space in their order. `auto` is front for its first trials, then nsga2."""
TIMINGS = ("auto", "exclusive", "concurrent")
"""Whether accelerators of one node are timed one at a time or side by side; `auto`: as they are found to disturb one
another."""
MODELLED = ("auto", "front")
"""Those that know what to expect of all that they have not measured."""
AUTO_FRONT_TRIALS = 200
"""By then `front` has found what there is in the spaces that were measured (tests/benchmarks/samplers.py), and an ask
costs it more with every trial; nsga2's costs are flat."""
