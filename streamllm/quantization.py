"""Weight-only quantization: linear layers read a quarter of float32's bytes per token; activations stay as they are.

torchao quantizes (symmetric, a scale per output row); the product is one kernel for one token and for blocks alike, so
that the evaluator's losses are the decode loop's, as closely as in bfloat16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Int8Linear(nn.Module):
    """y = x (scale * weight)^T + bias, weight (out, in) int8, scale (out)."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.scale = nn.Parameter(scale.to(dtype), requires_grad=False)
        self.bias = bias

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cpu:
            # The kernel of CPUs is fast in bfloat16 only; rounding the input to it adds a tenth to the error of int8.
            rows = input.reshape(-1, self.in_features).to(torch.bfloat16)
            output = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale).to(input.dtype)
            output = output.view(*input.shape[:-1], self.out_features)
        else:  # compiled, the conversion is part of the product
            output = (input @ self.weight.to(input.dtype).T) * self.scale
        return output if self.bias is None else output + self.bias


def quantize(model: PreTrainedModel, quantization: str) -> None:
    """Replaces every linear layer, the output layer included unless it is tied to the embedding.

    Raises UsageError if torchao is not installed."""
    if quantization == "none":
        return
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UsageError(f"quantization {quantization!r}: needs torchao; pip install -e '.[quant]'") from error
    dtype = torch.bfloat16 if model.device.type == "cpu" else model.dtype
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            # The CPU kernel reads rows in steps of 8, past the end if it must.
            if type(layer) is nn.Linear and layer.in_features % 8 == 0 and not (tied and layer is output):
                bias = layer.bias
                quantize_(layer, Int8WeightOnlyConfig())
                quantized: Any = layer.weight  # torchao's Int8Tensor
                parent.register_module(name, Int8Linear(quantized.qdata, quantized.scale.flatten(), bias, dtype))
