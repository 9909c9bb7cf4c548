"""Weight-only quantization: linear layers read a quarter (int8) or an eighth (int4) of float32's bytes per token;
activations stay as they are.

torchao quantizes; the product is one kernel for one token and for blocks alike, so that the evaluator's losses are the
decode loop's, as closely as in bfloat16. Which kernel that is depends on the machine, and some are wrong without
a word: each is tried, once per shape, before anything is measured with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..options import QUANTIZATIONS
from .cpu_kernels import matrix_vector
from .device import cpu_capability, device_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP = 32
"""Weights that share a scale and a zero point in int4. In int8 too a layer's inputs must be a multiple of it: torch's
kernel of CPUs reads rows in steps of 8 or, with AVX-512, of 16, past the end if it must."""

Weights = Callable[[], Tensor]
"""The weights (out, in) that a quantized layer stands for, in float32; made when asked for, as it takes memory."""


class QuantizedLinear(nn.Module):
    """A module that replaces a linear layer; a quantizer has its own `product`."""

    in_features: int
    out_features: int
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        output = self.product(input)
        return output if self.bias is None else output + self.bias

    def product(self, input: Tensor) -> Tensor:
        """input (..., in) of any float dtype -> (..., out) in that dtype, without the bias."""
        raise NotImplementedError


class Int8Linear(QuantizedLinear):
    """y = x (scale * weight)^T + bias, weight (out, in) int8, scale (out)."""

    has_kernel = False
    """Whether our own computes it, compiled for one token."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.scale = nn.Parameter(scale.to(dtype), requires_grad=False)
        self.bias = bias

    def product(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and input.numel() == self.in_features:
            if self.has_kernel:
                output = matrix_vector(self.weight, input.reshape(-1))
            else:
                # A sum of products, into which inductor puts the conversion: weights are read once, as bytes. On a CPU
                # in float32 at least: there bytes become bfloat16 at a quarter of that speed.
                dtype = torch.promote_types(input.dtype, torch.float32) if input.is_cpu else input.dtype
                output = (self.weight.to(dtype) * input.reshape(-1).to(dtype)).sum(-1)
            return (output * self.scale).to(input.dtype).view(*input.shape[:-1], self.out_features)
        if input.is_cpu:
            # The kernel of CPUs is fast in bfloat16 only; rounding the input to it adds a tenth to the error of int8.
            rows = input.reshape(-1, self.in_features).to(torch.bfloat16)
            output = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale).to(input.dtype)
            return output.view(*input.shape[:-1], self.out_features)
        return (input @ self.weight.to(input.dtype).T) * self.scale

    @classmethod
    def of(cls, layer: nn.Linear) -> tuple[Int8Linear, Weights]:
        """Symmetric, a scale per output row."""
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        dtype = torch.bfloat16 if layer.weight.is_cpu else layer.weight.dtype
        bias = layer.bias
        quantize_(layer, Int8WeightOnlyConfig())
        quantized: Any = layer.weight  # torchao's Int8Tensor
        found = cls(quantized.qdata, quantized.scale.flatten(), bias, dtype)
        return found, lambda: found.weight.float() * found.scale.float()[:, None]


class Int4Linear(QuantizedLinear):
    """y = x W^T + bias, two weights to a byte as torch's kernels want them; scales and zeros (in / GROUP, out, 2)."""

    def __init__(self, weight: Tensor, scales_and_zeros: Tensor, bias: Tensor | None, shape: torch.Size) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scales_and_zeros = nn.Parameter(scales_and_zeros, requires_grad=False)
        self.bias = bias

    def product(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features).to(torch.bfloat16)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu if input.is_cpu else torch.ops.aten._weight_int4pack_mm
        output = product(rows, self.weight, GROUP, self.scales_and_zeros).to(input.dtype)
        return output.view(*input.shape[:-1], self.out_features)

    @classmethod
    def of(cls, layer: nn.Linear) -> tuple[Int4Linear, Weights]:
        """Asymmetric, a scale and a zero point per GROUP weights of a row."""
        from torchao.quantization.utils import groupwise_affine_quantize_tensor

        rounded, scales_and_zeros = groupwise_affine_quantize_tensor(layer.weight.bfloat16(), 4, GROUP, torch.bfloat16)
        if layer.weight.is_cpu:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(rounded.int(), 1)
        else:
            packed = torch.ops.aten._convert_weight_to_int4pack(rounded, 2)
        found = cls(packed, scales_and_zeros, layer.bias, layer.weight.shape)
        return found, lambda: _int4_weights(rounded, found.scales_and_zeros)


def _int4_weights(rounded: Tensor, scales_and_zeros: Tensor) -> Tensor:
    """rounded (out, in) of 0 .. 15, or (out, in / 2) bytes as torchao has it for CUDA, the first in the high half."""
    if rounded.dtype == torch.uint8:
        rounded = torch.stack((rounded >> 4, rounded & 15), dim=-1).flatten(1)
    scales, zeros = scales_and_zeros.float().transpose(0, 1).unsqueeze(-2).unbind(-1)  # (out, in / GROUP, 1) each
    return ((rounded.unflatten(1, (-1, GROUP)).float() - 8) * scales + zeros).flatten(1)


@dataclass(frozen=True, slots=True)
class Quantizer:
    """An entry of `options.QUANTIZATIONS`."""

    replacement: Callable[[nn.Linear], tuple[QuantizedLinear, Weights]]
    """The replacement for a linear layer. Raises ImportError without torchao."""
    outputs: int = 1
    """A layer's outputs must be a multiple of this."""


INT8 = Quantizer(Int8Linear.of)
INT4 = Quantizer(Int4Linear.of, outputs=16)


def quantize(model: PreTrainedModel, quantization: str) -> None:
    """Replaces every linear layer whose shape fits, the output layer included. One that is tied to the embedding, of
    which a token reads one row, becomes a copy in int8 whatever the others become, and the embedding stays as it is: in
    int4 it costs SmolLM2 7% of perplexity, in int8 nothing that can be told. Which ones fit does not depend on the
    machine.

    Raises UsageError if torchao is not installed, or if a kernel computes something else here than it should."""
    entry = QUANTIZATIONS[quantization]
    if entry is None:
        return
    usual: Quantizer = entry.get()
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    dtype, tried = model.dtype, set()
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is not nn.Linear:
                continue
            shape = layer.in_features, layer.out_features
            quantizer = INT8 if tied and layer is output else usual
            if layer.in_features % GROUP or layer.out_features % quantizer.outputs:
                continue
            try:
                quantized, weights = quantizer.replacement(layer)
            except ImportError as error:
                fix = "pip install -e '.[quant]'"
                raise UsageError(f"quantization {quantization!r}: needs torchao; {fix}") from error
            if shape not in tried:
                _try_kernel(quantization, quantized, weights(), dtype)
                tried.add(shape)
            parent.register_module(name, quantized)


@torch.inference_mode()
def _try_kernel(quantization: str, layer: QuantizedLinear, weights: Tensor, dtype: torch.dtype) -> None:
    """One token and then five at once, all random, through the layer's kernel and through plain arithmetic.

    A kernel may round a weight to bfloat16 up to three times on the way (scaled, shifted), by 2^-9 of its group's
    largest or less, and its output once. With activations of random sign such errors add up as the products do, by
    their squares: six standard deviations are below 2^-5 of the size that a product of random signs has. A kernel that
    reads a wrong weight, scale or zero point is off by about that size. Raises UsageError."""
    rows = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16().to(weights.device)
    found = torch.cat([layer.product(part.to(dtype)) for part in (rows[:1], rows[1:])]).float()
    exact = rows.float() @ weights.T
    largest = weights.unflatten(1, (-1, GROUP)).abs().amax(-1)
    size = (rows.float().square().unflatten(1, (-1, GROUP)).sum(-1) @ largest.square().T).sqrt()
    wrong = ~((found - exact).abs() <= 2**-5 * size)  # so that NaN is wrong
    if wrong.any():
        where = f"this CPU ({cpu_capability()})" if weights.device.type == "cpu" else device_name(weights.device)
        raise UsageError(
            f"quantization {quantization!r}: torch's kernel is wrong on {where}, {found[wrong][0]:.4g} instead of "
            f"{exact[wrong][0]:.4g} in a layer of {layer.in_features} inputs and {layer.out_features} outputs; use "
            f"--quantization none, or another version of torch"
        )
