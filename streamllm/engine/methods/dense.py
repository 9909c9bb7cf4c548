"""`dense`: nothing is ever evicted; the cache grows with the stream."""

from dataclasses import replace

from ...policy import EvictionPolicy
from . import ours


def effective(policy: EvictionPolicy) -> EvictionPolicy:
    return replace(policy, compress_every=0, cache_slack=0, max_drop=0)


METHOD = replace(ours.METHOD, effective=effective)
