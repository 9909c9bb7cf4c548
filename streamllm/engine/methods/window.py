"""`window`: the most recent tokens only, no sinks (the failure that StreamingLLM cures); cache as in `ours`."""

from dataclasses import replace

from ...policy import EvictionPolicy
from . import ours


def effective(policy: EvictionPolicy) -> EvictionPolicy:
    """The same total, all of it window."""
    return replace(policy, n_sink=0, window_size=policy.kept)


METHOD = replace(ours.METHOD, effective=effective)
