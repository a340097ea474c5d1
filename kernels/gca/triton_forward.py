"""The forward kernel of grouped cross attention: chunks are read through the index, never gathered.

Notable: one program holds G S query rows of one query group and kv head, so decoding (S = 1) packs heads into rows.
With one key tile per chunk the denominator is known before the second product, the weight folds into P and a single
accumulator sums over all slots; the loop over slots has no branch, so that the next tiles are loaded while this one is
multiplied (an empty slot reads nothing and adds zeros). Longer chunks use an online softmax of their own. Scores are
in base 2. Every offset that grows with the store or with a stride is 64 bit.

Legend: B batch, N query groups, S rows of a group, Hk kv heads, G = H / Hk, D head size, E stored chunks, C keys of a
chunk, K retrieved chunks.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments are typed by Triton at launch. `sizes` is (N, E, K, S, C, Hk, D); a chunk's `place` is
# (batch row, chunk, kv head, number of valid keys).

import triton
import triton.language as tl


@triton.jit
def split_program(pid, num_rows, N, Hk, BLOCK_M: tl.constexpr):
    """Split a program number into (batch row, kv head, query group, first row); one head's programs are neighbours."""
    blocks = tl.cdiv(num_rows, BLOCK_M)
    group = pid // blocks
    return group // N // Hk, group // N % Hk, group % N, pid % blocks * BLOCK_M


@triton.jit
def row_offsets(first, head, S, D, Hk, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Locate rows (s, g) inside a query group: offsets into [S, H, D], into [H, S], and which rows exist."""
    row = first + tl.arange(0, BLOCK_M)
    s, h = row // G, head * G + row % G
    return (s.to(tl.int64) * Hk * G + h) * D, h * S + s, row < S * G


@triton.jit
def chunk_place(indices, lengths, slot, b, head, E, C, HAS_LENGTHS: tl.constexpr):
    """Return the place of a slot's chunk; an empty slot has chunk 0 and no valid key."""
    chunk = tl.load(indices + slot)
    known = tl.maximum(chunk, 0)
    if HAS_LENGTHS:
        length = tl.load(lengths + b.to(tl.int64) * E + known)
        return b, known, head, tl.where(chunk >= 0, length, 0)
    else:
        return b, known, head, tl.where(chunk >= 0, C, 0)


@triton.jit
def load_tile(
    x, strides, place, start, C, D,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, HAS_LENGTHS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Load keys or values ``[BLOCK_C, BLOCK_D]`` of a chunk from key `start` on; zeros beyond its length and D.

    Args:
        x: pointer, or tensor descriptor of ``[B, E, C, Hk, D]`` with blocks ``[1, 1, BLOCK_C, 1, BLOCK_D]``.
        strides: of the first four dimensions (with a pointer).
        place: batch row, chunk, head, and keys of the chunk.
        start: first key.
        C: keys of a chunk.
        D: head size.
        BLOCK_C: keys of a tile.
        BLOCK_D: D rounded up.
        HAS_LENGTHS: chunks may be shorter than C.
        DESCRIPTORS: ``x`` is a tensor descriptor.
    """
    b, chunk, head, length = place
    c, d = start + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    if DESCRIPTORS:
        # Past the end of a dimension the hardware fills in zeros: that is where an empty slot reads.
        tile = x.load([b, chunk, tl.where(length > 0, start, C), head, 0]).reshape(BLOCK_C, BLOCK_D)
        if HAS_LENGTHS:
            tile = tl.where(c[:, None] < length, tile, 0.0)
        return tile
    else:
        base = b.to(tl.int64) * strides[0] + chunk.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[3]
        mask = (c[:, None] < length) & (d[None, :] < D)
        return tl.load(x + base + c.to(tl.int64)[:, None] * strides[2] + d[None, :], mask=mask, other=0.0)


@triton.jit
def attend_tile(
    query, total, w, k, v, k_strides, v_strides, place, C, D, qk_scale, OFF_BY_ONE: tl.constexpr,
    BLOCK_C: tl.constexpr, HAS_LENGTHS: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ``w softmax(query K') V`` of a chunk that is one tile; returns the sum and the log-sum-exp (0 if empty)."""
    length = place[3]
    BLOCK_D: tl.constexpr = query.shape[1]
    key = load_tile(k, k_strides, place, 0, C, D, BLOCK_C, BLOCK_D, HAS_LENGTHS, DESCRIPTORS)
    score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * qk_scale
    score = tl.where(tl.arange(0, BLOCK_C)[None, :] < length, score, float("-inf"))
    peak = tl.where(length > 0, tl.max(score, 1), 0.0)
    if OFF_BY_ONE:
        peak = tl.maximum(peak, 0.0)
    p = tl.exp2(score - peak[:, None])
    norm = tl.sum(p, 1)
    if OFF_BY_ONE:
        norm += tl.exp2(-peak)
    norm = tl.where(length > 0, norm, 1.0)
    p *= (w / norm)[:, None]
    value = load_tile(v, v_strides, place, 0, C, D, BLOCK_C, BLOCK_D, HAS_LENGTHS, DESCRIPTORS)
    return tl.dot(p.to(value.dtype), value, total, input_precision=PRECISION), peak + tl.log2(norm)


@triton.jit
def attend_chunk(
    query, total, w, k, v, k_strides, v_strides, place, C, D, qk_scale, OFF_BY_ONE: tl.constexpr,
    BLOCK_C: tl.constexpr, HAS_LENGTHS: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Do as `attend_tile` for a chunk of several tiles, by an online softmax of its own."""
    length = place[3]
    BLOCK_M: tl.constexpr = query.shape[0]
    BLOCK_D: tl.constexpr = query.shape[1]
    peak, norm = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    if OFF_BY_ONE:
        peak, norm = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], 1.0, tl.float32)
    part = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, length, BLOCK_C):
        key = load_tile(k, k_strides, place, start, C, D, BLOCK_C, BLOCK_D, HAS_LENGTHS, DESCRIPTORS)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * qk_scale
        score = tl.where((start + tl.arange(0, BLOCK_C))[None, :] < length, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        shrink = tl.exp2(peak - higher)
        p = tl.exp2(score - higher[:, None])
        norm = norm * shrink + tl.sum(p, 1)
        value = load_tile(v, v_strides, place, start, C, D, BLOCK_C, BLOCK_D, HAS_LENGTHS, DESCRIPTORS)
        part = tl.dot(p.to(value.dtype), value, part * shrink[:, None], input_precision=PRECISION)
        peak = higher
    return total + part * (w / norm)[:, None], peak + tl.log2(norm)


@triton.jit
def forward_kernel(
    q, k, v, indices, weights, lengths, out, lse, qk_scale, sizes, k_strides, v_strides,
    G: tl.constexpr, HAS_LENGTHS: tl.constexpr, OFF_BY_ONE: tl.constexpr, SINGLE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write out ``[B, N, S, H, D]`` and the base 2 log-sum-exp ``[B, N, K, H, S]`` (0 at empty slots)."""
    N, E, K, S, C, Hk, D = sizes
    b, head, n, first = split_program(tl.program_id(0), S * G, N, Hk, BLOCK_M)
    group = b.to(tl.int64) * N + n
    rows, statistics, exists = row_offsets(first, head, S, D, Hk, G, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (d[None, :] < D)
    tile = group * S * Hk * G * D + rows[:, None] + d[None, :]
    query = tl.load(q + tile, mask=mask, other=0.0)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j in range(K):
        slot = group * K + j
        place = chunk_place(indices, lengths, slot, b, head, E, C, HAS_LENGTHS)
        w = tl.load(weights + slot, mask=place[3] > 0, other=0.0)
        norm = tl.zeros([BLOCK_M], tl.float32)
        if SINGLE:
            total, norm = attend_tile(
                query, total, w, k, v, k_strides, v_strides, place, C, D, qk_scale, OFF_BY_ONE,
                BLOCK_C, HAS_LENGTHS, DESCRIPTORS, PRECISION,
            )  # fmt: skip
        elif place[3] > 0:
            total, norm = attend_chunk(
                query, total, w, k, v, k_strides, v_strides, place, C, D, qk_scale, OFF_BY_ONE,
                BLOCK_C, HAS_LENGTHS, DESCRIPTORS, PRECISION,
            )  # fmt: skip
        tl.store(lse + slot * Hk * G * S + statistics, norm, mask=exists)
    tl.store(out + tile, total.to(out.dtype.element_ty), mask=mask)
