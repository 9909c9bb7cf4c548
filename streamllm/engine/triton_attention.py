"""One query's attention in Triton, split over the keys: Flash-Decoding (Dao et al. 2023), with a mask.

A single query gives a GPU one program per head, far fewer than it has multiprocessors. Here the keys are cut into
splits; a program reads those of one split and one KV head once, for all query heads of its group, and leaves a
normalised output and the logarithm of its softmax's denominator; a second kernel merges the splits. Flash in torch
splits too, and takes no mask. Imported only where it is used: Triton is optional.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
# ruff: noqa: ANN001, ANN201
# (a kernel's parameters are annotated for its compiler: `tl.constexpr` or nothing)

from __future__ import annotations

from functools import cache
from subprocess import SubprocessError
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
MOST_SPLITS = 128
"""The merge holds one row of each in registers."""
MERGED_COLUMNS = 16
_FEWEST_ROWS = 16
"""Rows that `tl.dot` needs: smaller groups of heads are padded to it."""


@triton.jit
def nothing_seen(group: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, block: tl.constexpr):
    """Of a softmax: the largest logit, the sum of its weights, and the weighted sum of values, before any key."""
    # For one query every lane of a block is a softmax of its own over every block-th key: nothing is exchanged.
    lanes: tl.constexpr = block if group == 1 else rows
    top = tl.full([lanes], float("-inf"), tl.float32)
    return top, tl.zeros([lanes], tl.float32), tl.zeros([lanes, columns], tl.float32)


@triton.jit
def see_block(queries, keys, values, seen, scale, top, total, output, group: tl.constexpr):
    """The same three after a block of keys and values (block, columns), of which those `seen` count.

    queries (columns) in float32 and scaled already, or (rows, columns) of a group."""
    if group == 1:
        logits = tl.sum(keys.to(tl.float32) * queries[None, :], 1)
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(top, logits)
    else:
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        logits = tl.where(seen[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)  # -inf less -inf, where nothing was seen yet
    kept = tl.exp2(top - shift)
    if group == 1:
        weights = tl.exp2(logits - shift)
        total = total * kept + weights
        output = output * kept[:, None] + weights[:, None] * values.to(tl.float32)
    else:
        weights = tl.exp2(logits - shift[:, None])
        total = total * kept + tl.sum(weights, 1)
        weighted = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        output = output * kept[:, None] + weighted
    return higher, total, output


@triton.jit
def leave_split(
    outputs,
    norms,
    top,
    total,
    output,
    pair,
    split,
    splits,
    group: tl.constexpr,
    size: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Writes a split's normalised output and the logarithm of its softmax's denominator."""
    column = tl.arange(0, columns)
    inside = column < size
    if group == 1:
        highest = tl.max(top, 0)
        weights = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
        sum_of_all = tl.sum(total * weights, 0)
        merged = tl.sum(output * weights[:, None], 0) / tl.where(sum_of_all == 0.0, 1.0, sum_of_all)
        place = pair * splits + split
        tl.store(norms + place, highest + tl.log2(sum_of_all))
        tl.store(outputs + place.to(tl.int64) * size + column, merged, mask=inside)
    else:
        heads = tl.arange(0, rows)
        output = output / tl.where(total == 0.0, 1.0, total)[:, None]
        places = (pair * group + heads) * splits + split
        tl.store(norms + places, top + tl.log2(total), mask=heads < group)
        wanted = (heads < group)[:, None] & inside[None, :]
        tl.store(outputs + places.to(tl.int64)[:, None] * size + column[None, :], output, mask=wanted)


@triton.jit
def read_queries(
    query,
    pair,
    head_stride,
    scale,
    group: tl.constexpr,
    size: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """A KV head's queries, as `see_block` wants them."""
    column = tl.arange(0, columns)
    inside = column < size
    if group == 1:
        return tl.load(query + pair * head_stride + column, mask=inside, other=0.0).to(tl.float32) * scale
    else:
        heads = tl.arange(0, rows)
        offsets = (pair * group + heads[:, None]) * head_stride + column[None, :]
        return tl.load(query + offsets, mask=(heads < group)[:, None] & inside[None, :], other=0.0)


@triton.jit(do_not_specialize=["held", "span", "kv_heads"])
def attend_split(
    query,
    key,
    value,
    mask,
    outputs,
    norms,
    scale,
    held,
    span,
    kv_heads,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    group: tl.constexpr,
    size: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
):
    """Program (i, j) attends to keys i * span .. of KV head j % kv_heads of batch row j // kv_heads.

    query (batch, KV heads, group, size) contiguous; outputs (batch, KV heads, group, splits, size) and norms (batch,
    KV heads, group, splits) in float32, contiguous; `scale` makes logits those of powers of 2; `rows` and `columns` are
    `group` and `size` padded to powers of 2; `span` is a multiple of `block`. A split that sees nothing has norm -inf.
    """
    split = tl.program_id(0)
    pair = tl.program_id(1)
    first = split * span
    tokens = tl.arange(0, block)
    column = tl.arange(0, columns)
    inside = column < size
    # 64 bits for what may be far away; inside a block 32 will do.
    batch = (pair // kv_heads).to(tl.int64)
    head = (pair % kv_heads).to(tl.int64)
    key += batch * key_batch + head * key_head + first.to(tl.int64) * key_token
    value += batch * value_batch + head * value_head + first.to(tl.int64) * value_token
    key_offsets = tokens[:, None] * key_token + column[None, :]
    value_offsets = tokens[:, None] * value_token + column[None, :]
    queries = read_queries(query, pair, size, scale, group, size, rows, columns)
    top, total, output = nothing_seen(group, rows, columns, block)
    for start in tl.range(0, tl.minimum(span, held - first), block, num_stages=stages):
        at = first + start + tokens
        seen = at < held
        there = seen[:, None] & inside[None, :]
        keys = tl.load(key + key_offsets, mask=there, other=0.0)
        values = tl.load(value + value_offsets, mask=there, other=0.0)
        if mask is not None:
            seen = seen & (tl.load(mask + at, mask=seen, other=0) != 0)
        top, total, output = see_block(queries, keys, values, seen, scale, top, total, output, group)
        key += block * key_token
        value += block * value_token
    leave_split(outputs, norms, top, total, output, pair, split, tl.num_programs(0), group, size, rows, columns)


@triton.jit(do_not_specialize=["splits"])
def merge_splits(outputs, norms, merged, splits, size: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """Program (i, j) merges columns j * columns .. of head i: outputs (heads, splits, size), norms (heads, splits) ->
    merged (heads, size). `rows` is `splits` padded to a power of 2."""
    head = tl.program_id(0)
    split = tl.arange(0, rows)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    there = split < splits
    norm = tl.load(norms + head * splits + split, mask=there, other=float("-inf"))
    weights = tl.exp2(norm - tl.max(norm, 0))
    offsets = (head * splits + split).to(tl.int64)[:, None] * size + column[None, :]
    parts = tl.load(outputs + offsets, mask=there[:, None], other=0.0)
    result = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(merged + head * size + column, result.to(merged.dtype.element_ty))


INTERPRETED = not isinstance(attend_split, triton.JITFunction)
"""Whether TRITON_INTERPRET=1 was set when this was imported: the kernels then run on CPU tensors, in numpy."""


class Cut(NamedTuple):
    """How the work is cut; what it computes does not depend on it."""

    block: int
    """Keys read at once."""
    warps: int
    stages: int
    """Blocks on their way at once; 1 leaves hiding the latency to other programs."""
    programs: int
    """Wanted per multiprocessor."""


def usual_cut(group: int, dtype: torch.dtype) -> Cut:
    """For so many query heads per KV head: in half precision the fastest of those tried on an H100 at 2,048 and 8,192
    keys, or within 1% of it; groups in float32 go without tensor cores, and by the registers that they take."""
    if group == 1:
        return Cut(16, 2, 3, 4)
    return Cut(64, 8, 2, 4) if dtype == torch.float32 else Cut(32, 2, 2, 4)


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 2  # interpreted: every program takes a while
    return torch.cuda.get_device_properties(device).multi_processor_count


def shapes(group: int, size: int, cut: Cut) -> dict[str, int]:
    """The values that `attend_split` is compiled for, besides types."""
    return {
        "group": group,
        "size": size,
        "rows": max(_FEWEST_ROWS, triton.next_power_of_2(group)),
        "columns": triton.next_power_of_2(size),
        "block": cut.block,
        "stages": cut.stages,
    }


def split_count(pairs: int, held: int, wanted: int, block: int) -> tuple[int, int]:
    """`wanted` programs over `pairs` of a batch row and a KV head -> splits, and the keys of each: a multiple of
    `block`, so that the last may have fewer."""
    splits = max(1, min(wanted // pairs, MOST_SPLITS))
    span = triton.cdiv(triton.cdiv(held, splits), block) * block
    return triton.cdiv(held, span), span


def refuse(query: Tensor) -> None:
    """Raises RuntimeError for a query (..., size) that the kernels cannot take."""
    if query.device.type == "cpu" and not INTERPRETED:
        raise RuntimeError("Triton compiles for GPUs; on a CPU, TRITON_INTERPRET=1 runs its kernels for tests")
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RuntimeError(f"the Triton kernel computes in float32: not for {query.dtype}")
    if query.shape[-1] % MERGED_COLUMNS:
        raise RuntimeError(f"the Triton kernel needs heads of a multiple of {MERGED_COLUMNS}, not of {query.shape[-1]}")


def flash_decoding(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    cut: Cut | None = None,
) -> Tensor:
    """softmax(query key^T scaling) value in float32, the weights in the values' dtype where a group shares a KV head.

    query (batch, heads, 1, size), key and value (batch, KV heads, held, size) -> (batch, heads, 1, size). `mask` (1,
    held) is True where visible; a query that sees nothing gets NaN. Raises RuntimeError for what the kernels cannot do.
    """
    batch, heads, _, size = query.shape
    kv_heads, held = key.shape[1], key.shape[2]
    refuse(query)
    query = query.contiguous()
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    mask = None if mask is None else mask.contiguous()
    group, pairs = heads // kv_heads, batch * kv_heads
    cut = cut or usual_cut(group, query.dtype)
    splits, span = split_count(pairs, held, cut.programs * multiprocessors(query.device), cut.block)
    outputs = torch.empty(batch * heads, splits, size, dtype=torch.float32, device=query.device)
    norms = torch.empty(batch * heads, splits, dtype=torch.float32, device=query.device)
    merged = torch.empty_like(query)
    with torch.cuda.device_of(query):
        attend_split[(splits, pairs)](
            query,
            key,
            value,
            mask,
            outputs,
            norms,
            scaling * LOG2_E,
            held,
            span,
            kv_heads,
            *key.stride()[:3],
            *value.stride()[:3],
            **shapes(group, size, cut),
            num_warps=cut.warps,
        )
        merge_splits[(batch * heads, size // MERGED_COLUMNS)](
            outputs,
            norms,
            merged,
            splits,
            size=size,
            rows=triton.next_power_of_2(splits),
            columns=MERGED_COLUMNS,
            num_warps=1,
        )
    return merged


@torch.library.custom_op("streamllm::flash_decoding", mutates_args=())
def decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """`flash_decoding` as an operator: compiled graphs call it as it is, and dispatch modes see it.

    Raises RuntimeError, as torch's kernels do, for all that keeps it from running."""
    try:
        return flash_decoding(query, key, value, mask, scaling)
    except (triton.TritonError, SubprocessError, OSError) as failure:  # no C compiler, too little shared memory
        raise RuntimeError(f"Triton cannot build its kernel: {failure}") from failure


@decode_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)
