"""streamllm: StreamingLLM policies on any rotary language model: exact quality, honest speed."""

__version__ = "0.1.0"
