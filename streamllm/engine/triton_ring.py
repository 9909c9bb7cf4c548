"""A ring's whole step in one layer, in Triton, as one launch: takes the new key and value in, turns the sinks to where
they belong now, attends, split over the slots (`triton_attention`), and merges the splits.

What a lazily pruned ring still has but has evicted is told by its age instead of a mask. The last program of a KV head
to finish merges what all left: they count themselves. Queries and keys come as the model rotated them.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
# ruff: noqa: ANN001, ANN201
# (a kernel's parameters are annotated for its compiler: `tl.constexpr` or nothing)

from __future__ import annotations

from subprocess import SubprocessError

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_attention import (
    LOG2_E,
    Cut,
    leave_split,
    multiprocessors,
    nothing_seen,
    read_queries,
    refuse,
    see_block,
    shapes,
    split_count,
    usual_cut,
)

MERGED_SPLITS = 8
"""Splits that the merge reads at once."""


@triton.jit
def sinks_in_place(
    sinks,
    cos,
    sin,
    at,
    seen,
    size: tl.constexpr,
    columns: tl.constexpr,
    turned: tl.constexpr,
    interleaved: tl.constexpr,
):
    """Keys `at` (block) of sinks (S, size), with their first `turned` components turned on: (block, columns)."""
    column = tl.arange(0, columns)
    rows = sinks + at[:, None] * size
    keys = tl.load(rows + column[None, :], mask=seen[:, None] & (column < size)[None, :], other=0.0)
    if interleaved:
        partner = column ^ 1
        sign = tl.where(column % 2 == 0, -1.0, 1.0)
    else:
        partner = tl.where(column < turned // 2, column + turned // 2, column - turned // 2)
        sign = tl.where(column < turned // 2, -1.0, 1.0)
    inside = column < turned
    partners = tl.load(rows + partner[None, :], mask=seen[:, None] & inside[None, :], other=0.0)
    cosines = tl.load(cos + column, mask=inside, other=1.0)
    sines = tl.load(sin + column, mask=inside, other=0.0) * sign
    return (keys.to(tl.float32) * cosines[None, :] + partners.to(tl.float32) * sines[None, :]).to(keys.dtype)


@triton.jit
def merge_all(
    outputs,
    norms,
    merged,
    pair,
    splits,
    group: tl.constexpr,
    size: tl.constexpr,
    columns: tl.constexpr,
    block: tl.constexpr,
):
    """A KV head's outputs (group, splits, size) by their norms (group, splits) -> merged (group, size)."""
    column = tl.arange(0, columns)
    part = tl.arange(0, block)
    inside = column < size
    for head in range(group):
        place = (pair * group + head).to(tl.int64)
        top = tl.full([block], float("-inf"), tl.float32)
        total = tl.zeros([block], tl.float32)
        output = tl.zeros([block, columns], tl.float32)
        for start in range(0, splits, block):
            there = start + part < splits
            # Past the first cache, which is the multiprocessor's own: other ones wrote this.
            norm = tl.load(norms + place * splits + start + part, mask=there, other=float("-inf"), cache_modifier=".cg")
            rows = outputs + (place * splits + start + part)[:, None] * size + column[None, :]
            parts = tl.load(rows, mask=there[:, None] & inside[None, :], other=0.0, cache_modifier=".cg")
            higher = tl.maximum(top, norm)
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            kept = tl.exp2(top - shift)
            weights = tl.exp2(norm - shift)
            total = total * kept + weights
            output = output * kept[:, None] + parts * weights[:, None]
            top = higher
        weights = tl.exp2(top - tl.max(top, 0))
        result = tl.sum(output * weights[:, None], 0) / tl.sum(total * weights, 0)
        tl.store(merged + place * size + column, result.to(merged.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_sink", "window", "span"])
def ring_step(
    query,
    new_key,
    new_value,
    keys,
    values,
    sinks,
    cos,
    sin,
    position,
    evicted,
    outputs,
    norms,
    finished,
    merged,
    scale,
    n_sink,
    window,
    span,
    query_stride,
    key_stride,
    value_stride,
    turned: tl.constexpr,
    interleaved: tl.constexpr,
    group: tl.constexpr,
    size: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
    merged_splits: tl.constexpr,
):
    """Program (i, j) attends to slots i * span .. of the window of KV head j; the last i to the sinks and the new token
    too.

    query (KV heads * group, size), new_key and new_value (KV heads, size), by the strides of their heads; keys and
    values (KV heads, S + window, size), and sinks (KV heads, S, size), contiguous; cos and sin (turned), by which the
    sinks are turned, if any; position and evicted (1); finished (KV heads) zeros, which it leaves as zeros; outputs
    and norms as in `attend_split`.
    """
    split = tl.program_id(0)
    pair = tl.program_id(1)
    splits = tl.num_programs(0)
    first = split * span
    tokens = tl.arange(0, block)
    column = tl.arange(0, columns)
    inside = column < size
    ring = pair.to(tl.int64) * (n_sink + window) * size
    keys += ring
    values += ring
    seen_before = tl.load(position) - n_sink
    slot = (seen_before % window).to(tl.int32)
    oldest = (seen_before - tl.load(evicted)).to(tl.int32)  # age of the oldest token of the window that counts
    key = tl.load(new_key + pair * key_stride + column, mask=inside, other=0.0).to(keys.dtype.element_ty)
    value = tl.load(new_value + pair * value_stride + column, mask=inside, other=0.0).to(values.dtype.element_ty)
    after_first = column * 0 + (slot - first)
    mine = inside & (after_first >= 0) & (after_first < span)
    tl.store(keys + (n_sink + slot) * size + column, key, mask=mine)
    tl.store(values + (n_sink + slot) * size + column, value, mask=mine)

    queries = read_queries(query, pair, query_stride, scale, group, size, rows, columns)
    top, total, output = nothing_seen(group, rows, columns, block)
    few: tl.constexpr = block if group == 1 else 16  # at once: as many as there are softmaxes, or as `tl.dot` needs
    for start in range(0, tl.where(split == splits - 1, n_sink + 1, 0), few):
        at = start + tl.arange(0, few)
        old = at < n_sink
        there = old[:, None] & inside[None, :]
        offsets = at[:, None] * size + column[None, :]
        if turned:
            own = sinks + pair.to(tl.int64) * n_sink * size
            block_keys = sinks_in_place(own, cos, sin, at, old, size, columns, turned, interleaved)
            block_keys = block_keys.to(keys.dtype.element_ty)
        else:
            block_keys = tl.load(keys + offsets, mask=there, other=0.0)
        block_keys = tl.where(there, block_keys, key[None, :]).to(query.dtype.element_ty)
        block_values = tl.where(there, tl.load(values + offsets, mask=there, other=0.0), value[None, :])
        block_values = block_values.to(query.dtype.element_ty)
        top, total, output = see_block(
            queries, block_keys, block_values, at <= n_sink, scale, top, total, output, group
        )
    keys += (n_sink + first).to(tl.int64) * size
    values += (n_sink + first).to(tl.int64) * size
    offsets = tokens[:, None] * size + column[None, :]
    for start in tl.range(0, tl.minimum(span, window - first), block, num_stages=stages):
        at = first + start + tokens
        there = (at < window)[:, None] & inside[None, :]
        age = slot - at
        age = tl.where(age < 0, age + window, age)
        seen = (at < window) & (age <= oldest) & (age > 0)  # what is new is in a register, in its slot soon
        block_keys = tl.load(keys + offsets, mask=there, other=0.0).to(query.dtype.element_ty)
        block_values = tl.load(values + offsets, mask=there, other=0.0).to(query.dtype.element_ty)
        top, total, output = see_block(queries, block_keys, block_values, seen, scale, top, total, output, group)
        keys += block * size
        values += block * size
    leave_split(outputs, norms, top, total, output, pair, split, splits, group, size, rows, columns)

    tl.debug_barrier()  # all that this program's threads wrote, before it counts itself
    if tl.atomic_add(finished + pair, 1, sem="acq_rel") == splits - 1:
        merge_all(outputs, norms, merged, pair, splits, group, size, columns, merged_splits)
        tl.store(finished + pair, 0)


def ring_cut(group: int, dtype: torch.dtype) -> Cut:
    """As for attention alone, but with fewer programs for a group, as one of them merges what all of its KV head left:
    on an H100, with four heads to each of eight KV heads and 2,048 keys, 14.5 us with one to a multiprocessor, 15.2
    with two, and 21.2 with four."""
    cut = usual_cut(group, dtype)
    return cut if group == 1 else cut._replace(programs=2)


def attend_in_ring(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    sinks: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor,
    evicted: Tensor,
    finished: Tensor,
    scaling: float,
    n_sink: int,
    interleaved: bool,
    cut: Cut | None = None,
) -> Tensor:
    """query (1, heads, 1, size), key and value (1, KV heads, 1, size) of the token at `position` (1) of the stream,
    which is no sink; keys and values (1, KV heads, S + window, size), the ring, which takes it in, of any number
    format; `evicted` (1) tokens of the stream count no more. sinks (1, KV heads, S, size) as the model rotated them, to
    be turned by cos and sin (1, rotary size); None: they are in the ring as they are. finished (KV heads) int32 zeros.
    -> (1, heads, 1, size).

    Raises RuntimeError for what the kernel cannot do."""
    _, heads, _, size = query.shape
    kv_heads, slots = keys.shape[1:3]
    refuse(query)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    group = heads // kv_heads
    cut = cut or ring_cut(group, query.dtype)
    window = slots - n_sink
    splits, span = split_count(kv_heads, window, cut.programs * multiprocessors(query.device), cut.block)
    outputs = torch.empty(heads, splits, size, dtype=torch.float32, device=query.device)
    norms = torch.empty(heads, splits, dtype=torch.float32, device=query.device)
    merged = torch.empty_like(query, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(query):
        ring_step[(splits, kv_heads)](
            query,
            key,
            value,
            keys,
            values,
            sinks,
            cos,
            sin,
            position,
            evicted,
            outputs,
            norms,
            finished,
            merged,
            scaling * LOG2_E,
            n_sink,
            window,
            span,
            query.stride(1),
            key.stride(1),
            value.stride(1),
            turned=0 if cos is None else cos.shape[-1],
            interleaved=interleaved,
            **shapes(group, size, cut),
            merged_splits=MERGED_SPLITS,
            num_warps=cut.warps,
        )
    return merged


@torch.library.custom_op("streamllm::ring_attention", mutates_args=("keys", "values", "finished"))
def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    sinks: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor,
    evicted: Tensor,
    finished: Tensor,
    scaling: float,
    n_sink: int,
    interleaved: bool,
) -> Tensor:
    """`attend_in_ring` as an operator: compiled graphs call it as it is, and dispatch modes see it."""
    try:
        return attend_in_ring(
            query, key, value, keys, values, sinks, cos, sin, position, evicted, finished, scaling, n_sink, interleaved
        )
    except (triton.TritonError, SubprocessError, OSError) as failure:  # no C compiler, too little shared memory
        raise RuntimeError(f"Triton cannot build its kernel: {failure}") from failure


@ring_attention.register_fake
def _(query: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def attention_over(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """One query (1, heads, 1, size) over key and value (1, KV heads, held, size), as a full ring without sinks, of
    which the last token is taken in once more."""
    key, value = key.contiguous(), value.contiguous()
    last = torch.full((1,), key.shape[2] - 1, device=key.device)
    nothing = torch.zeros_like(last)
    finished = torch.zeros(key.shape[1], dtype=torch.int32, device=key.device)
    new = key[:, :, -1:].clone(), value[:, :, -1:].clone()
    return ring_attention(query, *new, key, value, None, None, None, last, nothing, finished, scaling, 0, False)
