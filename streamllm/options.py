"""What can be asked for by name, besides methods (`methods/`) and attention backends (`backends`)."""

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
PROTOCOLS = ("fast", "decode-loop")
"""fast: quality block-parallel, timing in the steady state. decode-loop: both from decoding token by token."""
