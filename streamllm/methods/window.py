"""`window`: the most recent tokens only, no sinks (the failure that StreamingLLM cures); cache as in `ours`."""

from dataclasses import replace

from ..policy import EvictionPolicy
from .ours import decoder

__all__ = ["decoder", "effective"]


def effective(policy: EvictionPolicy) -> EvictionPolicy:
    """The same total, all of it window."""
    return replace(policy, n_sink=0, window_size=policy.kept)
