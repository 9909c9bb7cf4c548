"""What a whole model's logits owe to the attention kernel: the same tokens through every backend, beside `math`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..configuration import Configuration
from ..engine.decoder import make_decoder
from ..policy import EvictionPolicy

if TYPE_CHECKING:
    from ..engine.model import LoadedModel

_TOKENS = 128


@torch.inference_mode()
def backend_logits(loaded: LoadedModel, backend: str) -> torch.Tensor:
    """(tokens, vocabulary), float32: of random tokens, the same for all backends, with nothing evicted. The last
    quarter is decoded one by one: kernels differ in what they take."""
    decoded = _TOKENS // 4
    tokens = torch.randint(loaded.vocabulary, (_TOKENS,), generator=torch.Generator().manual_seed(0)).to(loaded.device)
    what = Configuration("dense", EvictionPolicy(), backend)
    decoder = make_decoder(loaded, what)
    with what.kernel.active():
        logits = [decoder.feed(tokens[:-decoded], logits_to_keep=0)]
        logits += [decoder.feed(token) for token in tokens[-decoded:].split(1)]
    return torch.cat(logits).float()


def logit_differences(loaded: LoadedModel, backends: Sequence[str]) -> tuple[dict[str, float], float]:
    """The largest difference of a logit to math's, by backend; and the size of the largest logit. To eager's, of models
    whose softmax is more than torch's kernels have."""
    reference = backend_logits(loaded, "math" if loaded.has_plain_softmax else "eager")
    found = {name: float((backend_logits(loaded, name) - reference).abs().max()) for name in backends}
    return found, float(reference.abs().max())
