"""Weight-only quantization: linear layers read a quarter (int8) or an eighth (int4) of float32's bytes per token;
activations stay as they are.

torchao quantizes; the product is one kernel for one token and for blocks alike, so that the evaluator's losses are the
decode loop's, as closely as in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP = 32
"""Weights that share a scale and a zero point in int4."""


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

    @classmethod
    def of(cls, layer: nn.Linear) -> Int8Linear:
        """Symmetric, a scale per output row."""
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        dtype = torch.bfloat16 if layer.weight.is_cpu else layer.weight.dtype
        bias = layer.bias
        quantize_(layer, Int8WeightOnlyConfig())
        quantized: Any = layer.weight  # torchao's Int8Tensor
        return cls(quantized.qdata, quantized.scale.flatten(), bias, dtype)


class Int4Linear(nn.Module):
    """y = x W^T + bias, two weights to a byte as torch's kernels want them; scales and zeros (in / GROUP, out, 2)."""

    def __init__(self, weight: Tensor, scales_and_zeros: Tensor, bias: Tensor | None, shape: torch.Size) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scales_and_zeros = nn.Parameter(scales_and_zeros, requires_grad=False)
        self.bias = bias

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features).to(torch.bfloat16)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu if input.is_cpu else torch.ops.aten._weight_int4pack_mm
        output = product(rows, self.weight, GROUP, self.scales_and_zeros).to(input.dtype)
        output = output.view(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias

    @classmethod
    def of(cls, layer: nn.Linear) -> Int4Linear:
        """Asymmetric, a scale and a zero point per GROUP weights of a row."""
        from torchao.quantization.utils import groupwise_affine_quantize_tensor

        rounded, scales_and_zeros = groupwise_affine_quantize_tensor(layer.weight.bfloat16(), 4, GROUP, torch.bfloat16)
        if layer.weight.is_cpu:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(rounded.int(), 1)
        else:
            packed = torch.ops.aten._convert_weight_to_int4pack(rounded, 2)
        return cls(packed, scales_and_zeros, layer.bias, layer.weight.shape)


_LAYERS: dict[str, tuple[Callable[[nn.Linear], nn.Module], int, int]] = {
    # The int8 kernel of CPUs reads rows in steps of 8, past the end if it must.
    "int8_weight_only": (Int8Linear.of, 8, 1),
    "int4_weight_only": (Int4Linear.of, GROUP, 16),
}
"""What replaces a linear layer, and what its inputs and outputs must be multiples of."""


def quantize(model: PreTrainedModel, quantization: str) -> None:
    """Replaces every linear layer, the output layer included unless it is tied to the embedding.

    Raises UsageError if torchao is not installed."""
    if quantization == "none":
        return
    replacement, inputs, outputs = _LAYERS[quantization]
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is not nn.Linear or (tied and layer is output):
                continue
            if layer.in_features % inputs == 0 and layer.out_features % outputs == 0:
                try:
                    parent.register_module(name, replacement(layer))
                except ImportError as error:
                    fix = "pip install -e '.[quant]'"
                    raise UsageError(f"quantization {quantization!r}: needs torchao; {fix}") from error
