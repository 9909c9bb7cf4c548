"""streamllm: StreamingLLM policies on any rotary language model: exact quality, honest speed.

Import it before torch: that makes OpenMP's threads sleep while they wait (`environment.wait_passively`).
"""

from .environment import wait_passively

__version__ = "0.1.0"

wait_passively()
