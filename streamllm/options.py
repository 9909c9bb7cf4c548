"""What can be asked for by name, besides methods (`methods/`) and attention backends (`backends`)."""

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
EXECUTIONS = ("eager", "compile", "cudagraph")
QUANTIZATIONS = ("none", "int8_weight_only", "int4_weight_only")
PROTOCOLS = ("fast", "decode-loop", "chunked")
"""fast: quality block-parallel, timing in the steady state. decode-loop: both from decoding token by token. chunked:
both from chunks of the text, each a prefill, one compression and a short continuation."""
