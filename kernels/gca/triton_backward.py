"""The two backward kernels of grouped cross attention and the sum of split lists; no atomics.

Notable: `query_kernel` walks the slots of a query group (dQ, delta, partial dw); `key_kernel` walks the slots that
chose a chunk through the reverse index (dK, dV). A chunk chosen often is split into pieces whose float32 parts
`reduce_kernel` adds in order. ``dA = w P (dP - delta)``, ``delta = sum_c P dP``.

Legend: B batch, N query groups, S rows of a group, Hk kv heads, G = H / Hk, D head size, E stored chunks, C keys of a
chunk, K retrieved chunks.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments are typed by Triton at launch; `sizes` and `place` as in triton_forward.py.

import triton
import triton.language as tl

from kernels.gca.triton_forward import chunk_place, load_tile, row_offsets, split_program


@triton.jit
def probabilities(
    query, upstream, norm, k, v, k_strides, v_strides, place, start, C, D, qk_scale,
    BLOCK_C: tl.constexpr, HAS_LENGTHS: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Recompute ``P`` and ``dP`` of one key tile, ``[BLOCK_M, BLOCK_C]`` each, and return the keys too."""
    BLOCK_D: tl.constexpr = query.shape[1]
    key = load_tile(k, k_strides, place, start, C, D, BLOCK_C, BLOCK_D, HAS_LENGTHS, DESCRIPTORS)
    score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * qk_scale
    alive = (start + tl.arange(0, BLOCK_C))[None, :] < place[3]
    p = tl.where(alive, tl.exp2(score - norm[:, None]), 0.0)
    value = load_tile(v, v_strides, place, start, C, D, BLOCK_C, BLOCK_D, HAS_LENGTHS, DESCRIPTORS)
    return p, tl.dot(upstream, tl.trans(value), input_precision=PRECISION), key


@triton.jit
def differentiate_slot(
    query, upstream, total, w, norm, k, v, k_strides, v_strides, place, C, D, qk_scale, SINGLE: tl.constexpr,
    BLOCK_C: tl.constexpr, HAS_LENGTHS: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ``dA K`` of one slot; returns the sum and ``delta``."""
    if SINGLE:
        p, grad_p, key = probabilities(
            query, upstream, norm, k, v, k_strides, v_strides, place, 0, C, D, qk_scale,
            BLOCK_C, HAS_LENGTHS, DESCRIPTORS, PRECISION,
        )  # fmt: skip
        delta = tl.sum(p * grad_p, 1)
        grad_a = w * p * (grad_p - delta[:, None])
        return tl.dot(grad_a.to(key.dtype), key, total, input_precision=PRECISION), delta
    else:
        delta = tl.zeros_like(norm)
        for start in range(0, place[3], BLOCK_C):
            p, grad_p, key = probabilities(
                query, upstream, norm, k, v, k_strides, v_strides, place, start, C, D, qk_scale,
                BLOCK_C, HAS_LENGTHS, DESCRIPTORS, PRECISION,
            )  # fmt: skip
            delta += tl.sum(p * grad_p, 1)
        for start in range(0, place[3], BLOCK_C):
            p, grad_p, key = probabilities(
                query, upstream, norm, k, v, k_strides, v_strides, place, start, C, D, qk_scale,
                BLOCK_C, HAS_LENGTHS, DESCRIPTORS, PRECISION,
            )  # fmt: skip
            grad_a = w * p * (grad_p - delta[:, None])
            total = tl.dot(grad_a.to(key.dtype), key, total, input_precision=PRECISION)
        return total, delta


@triton.jit
def query_kernel(
    q, k, v, indices, weights, lengths, grad_out, lse, delta, grad_q, grad_w,
    scale, qk_scale, sizes, k_strides, v_strides,
    G: tl.constexpr, HAS_LENGTHS: tl.constexpr, SINGLE: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dq, delta ``[B, N, K, H, S]`` and dw ``[B, N, K, Hk, row blocks]``; both are 0 at empty slots."""
    N, E, K, S, C, Hk, D = sizes
    b, head, n, first = split_program(tl.program_id(0), S * G, N, Hk, BLOCK_M)
    group, blocks = b.to(tl.int64) * N + n, tl.cdiv(S * G, BLOCK_M)
    rows, statistics, exists = row_offsets(first, head, S, D, Hk, G, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (d[None, :] < D)
    tile = group * S * Hk * G * D + rows[:, None] + d[None, :]
    query = tl.load(q + tile, mask=mask, other=0.0)
    upstream = tl.load(grad_out + tile, mask=mask, other=0.0)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j in range(K):
        slot = group * K + j
        place = chunk_place(indices, lengths, slot, b, head, E, C, HAS_LENGTHS)
        w = tl.load(weights + slot, mask=place[3] > 0, other=0.0)
        norm = tl.load(lse + slot * Hk * G * S + statistics, mask=exists, other=0.0)
        total, row_delta = differentiate_slot(
            query, upstream, total, w, norm, k, v, k_strides, v_strides, place, C, D, qk_scale, SINGLE,
            BLOCK_C, HAS_LENGTHS, DESCRIPTORS, PRECISION,
        )  # fmt: skip
        tl.store(delta + slot * Hk * G * S + statistics, row_delta, mask=exists)
        tl.store(grad_w + (slot * Hk + head) * blocks + first // BLOCK_M, tl.sum(tl.where(exists, row_delta, 0.0), 0))
    tl.store(grad_q + tile, (total * scale).to(grad_q.dtype.element_ty), mask=mask)


@triton.jit
def key_step(
    q, grad_out, weights, lse, delta, slot, first, key, value, alive, sum_k, sum_v, head, sizes, qk_scale,
    G: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what one block of rows of one slot gives to dk (without the scale) and dv."""
    K, S, Hk, D = sizes[2], sizes[3], sizes[5], sizes[6]
    rows, statistics, exists = row_offsets(first, head, S, D, Hk, G, BLOCK_M)
    BLOCK_D: tl.constexpr = key.shape[1]
    d = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (d[None, :] < D)
    tile = slot // K * S * Hk * G * D + rows[:, None] + d[None, :]
    w = tl.load(weights + slot)
    query = tl.load(q + tile, mask=mask, other=0.0)
    norm = tl.load(lse + slot * Hk * G * S + statistics, mask=exists, other=0.0)
    score = tl.dot(key, tl.trans(query), input_precision=PRECISION) * qk_scale
    p = tl.where(alive[:, None] & exists[None, :], w * tl.exp2(score - norm[None, :]), 0.0)
    upstream = tl.load(grad_out + tile, mask=mask, other=0.0)
    sum_v = tl.dot(p.to(upstream.dtype), upstream, sum_v, input_precision=PRECISION)
    row_delta = tl.load(delta + slot * Hk * G * S + statistics, mask=exists, other=0.0)
    grad_a = p * (tl.dot(value, tl.trans(upstream), input_precision=PRECISION) - row_delta[None, :])
    return tl.dot(grad_a.to(query.dtype), query, sum_k, input_precision=PRECISION), sum_v


@triton.jit(do_not_specialize=["first_head", "heads"])
def key_kernel(
    q, k, v, weights, lengths, grad_out, lse, delta,
    order, piece_chunk, piece_start, piece_stop, piece_part, grad_k, grad_v, part_k, part_v,
    scale, qk_scale, first_head, heads, sizes, k_strides, v_strides,
    G: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of one piece, key tile and head: the result if the chunk has one piece, else a float32 part."""
    E, S, C, Hk, D = sizes[1], sizes[3], sizes[4], sizes[5], sizes[6]
    tiles, blocks = tl.cdiv(C, BLOCK_C), tl.cdiv(S * G, BLOCK_M)
    piece, local = tl.program_id(0) // tiles // heads, tl.program_id(0) // tiles % heads
    first_key, head = tl.program_id(0) % tiles * BLOCK_C, first_head + local
    start, stop = tl.load(piece_start + piece), tl.load(piece_stop + piece)
    if start < stop:
        number = tl.load(piece_chunk + piece)
        length = C
        if HAS_LENGTHS:
            length = tl.load(lengths + number)
        place = number // E, number % E, head, length
        d, c = tl.arange(0, BLOCK_D), first_key + tl.arange(0, BLOCK_C)
        key = load_tile(k, k_strides, place, first_key, C, D, BLOCK_C, BLOCK_D, HAS_LENGTHS, False)
        value = load_tile(v, v_strides, place, first_key, C, D, BLOCK_C, BLOCK_D, HAS_LENGTHS, False)
        sum_k, sum_v = tl.zeros([BLOCK_C, BLOCK_D], tl.float32), tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        for step in range((stop - start) * blocks):
            slot = tl.load(order + start + step // blocks).to(tl.int64)
            sum_k, sum_v = key_step(
                q, grad_out, weights, lse, delta, slot, step % blocks * BLOCK_M, key, value, c < length,
                sum_k, sum_v, head, sizes, qk_scale, G, BLOCK_M, PRECISION,
            )  # fmt: skip
        mask = (c[:, None] < C) & (d[None, :] < D)
        part = tl.load(piece_part + piece)
        if part < 0:
            offset = ((number.to(tl.int64) * C + c[:, None]) * Hk + head) * D + d[None, :]
            tl.store(grad_k + offset, (sum_k * scale).to(grad_k.dtype.element_ty), mask=mask)
            tl.store(grad_v + offset, sum_v.to(grad_v.dtype.element_ty), mask=mask)
        else:
            offset = ((part.to(tl.int64) * heads + local) * C + c[:, None]) * D + d[None, :]
            tl.store(part_k + offset, sum_k * scale, mask=mask)
            tl.store(part_v + offset, sum_v, mask=mask)


@triton.jit(do_not_specialize=["first_head", "heads"])
def reduce_kernel(
    chunk_part, chunk_pieces, grad_k, grad_v, part_k, part_v, first_head, heads, C, Hk, D,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the parts of a chunk in order; write zeros where no slot chose it."""
    tiles = tl.cdiv(C, BLOCK_C)
    place, local = tl.program_id(0) // tiles // heads, tl.program_id(0) // tiles % heads
    pieces = tl.load(chunk_pieces + place)
    if pieces != 1:
        d, c = tl.arange(0, BLOCK_D), tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = (c[:, None] < C) & (d[None, :] < D)
        first = tl.load(chunk_part + place).to(tl.int64)
        sum_k, sum_v = tl.zeros([BLOCK_C, BLOCK_D], tl.float32), tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        for number in range(pieces):
            offset = (((first + number) * heads + local) * C + c[:, None]) * D + d[None, :]
            sum_k += tl.load(part_k + offset, mask=mask, other=0.0)
            sum_v += tl.load(part_v + offset, mask=mask, other=0.0)
        offset = ((place.to(tl.int64) * C + c[:, None]) * Hk + first_head + local) * D + d[None, :]
        tl.store(grad_k + offset, sum_k.to(grad_k.dtype.element_ty), mask=mask)
        tl.store(grad_v + offset, sum_v.to(grad_v.dtype.element_ty), mask=mask)
