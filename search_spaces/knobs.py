"""The knobs of spaces and matrices: words by the registries that own them, numbers and usual values by the schema."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from streamllm.engine.backends import BACKENDS
from streamllm.engine.methods import METHODS
from streamllm.options import EXECUTIONS, QUANTIZATIONS
from streamllm.policy import FORMS, check_word
from streamllm.policy import WORDS as POLICY_WORDS
from streamllm.results.schema import KNOBS

from .space import Value

WORDS: dict[str, tuple[str, ...]] = {
    "method": METHODS,
    "attn_backend": tuple(BACKENDS),
    "execution": tuple(EXECUTIONS),
    "quantization": tuple(QUANTIZATIONS),
    **POLICY_WORDS,
}
CHECKS: dict[str, Callable[[str], None]] = {name: partial(check_word, name) for name in FORMS}
"""Of words that may be any of some form."""
LEAST = {field.parameter: field.least for field in KNOBS if field.least is not None}
USUAL: dict[str, Value] = {field.parameter: field.usual for field in KNOBS if field.usual is not None}
"""A knob's value where a space does not give one; the window is what the total leaves."""
