"""The two backward kernels of grouped cross attention and the sum of split lists; no atomics.

Notable: `query_kernel` walks the slots of a query group (dQ, delta, partial dw); `key_kernel` walks the slots that
chose a chunk through the reverse map (dK, dV). A chunk chosen often is split into pieces whose float32 parts
`reduce_kernel` adds in order. ``dA = w P (dP - delta)``, ``delta = sum_c P dP``.

Legend: B batch, N query groups, S rows of a group, Hk kv heads, G = H / Hk, D head size, E stored chunks, C keys of a
chunk, K retrieved chunks.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments are typed by Triton at launch.

import triton
import triton.language as tl

from kernels.gca.triton_forward import chunk_length, load_tile, row_offsets, split_program


@triton.jit
def probabilities(
    query, upstream, norm, keys, values, c, d, length, D, k_c, v_c, qk_scale, PRECISION: tl.constexpr
):  # fmt: skip
    """Recompute ``P`` and ``dP`` of one key tile, ``[BLOCK_M, BLOCK_C]`` each, and return the keys too."""
    key = load_tile(keys, c, d, length, D, k_c)
    score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * qk_scale
    p = tl.where(c[None, :] < length, tl.exp2(score - norm[:, None]), 0.0)
    grad_p = tl.dot(upstream, tl.trans(load_tile(values, c, d, length, D, v_c)), input_precision=PRECISION)
    return p, grad_p, key


@triton.jit
def query_kernel(
    q, k, v, indices, weights, lengths, grad_out, lse, delta, grad_q, grad_w,
    scale, qk_scale, N, E, K, S, C, Hk, D,
    k_b, k_e, k_c, k_h, v_b, v_e, v_c, v_h,
    G: tl.constexpr, HAS_LENGTHS: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dq, delta ``[B, N, K, H, S]`` of filled slots and dw ``[B, N, K, Hk, row blocks]`` (0 at empty slots)."""
    b, head, n, first = split_program(tl.program_id(0), S * G, N, Hk, BLOCK_M)
    group, blocks = b * N + n, tl.cdiv(S * G, BLOCK_M)
    rows, statistics, exists = row_offsets(first, head, S, D, Hk, G, BLOCK_M)
    d, col = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    mask = exists[:, None] & (d[None, :] < D)
    base = group.to(tl.int64) * (S * Hk * G * D)
    query = tl.load(q + base + rows[:, None] + d[None, :], mask=mask, other=0.0)
    upstream = tl.load(grad_out + base + rows[:, None] + d[None, :], mask=mask, other=0.0)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j in range(K):
        slot = group.to(tl.int64) * K + j
        chunk = tl.load(indices + slot).to(tl.int64)
        length = chunk_length(lengths, chunk, b, E, C, HAS_LENGTHS)
        row_delta = tl.zeros([BLOCK_M], tl.float32)
        if length > 0:
            w = tl.load(weights + slot)
            keys = k + b.to(tl.int64) * k_b + chunk * k_e + head * k_h
            values = v + b.to(tl.int64) * v_b + chunk * v_e + head * v_h
            norm = tl.load(lse + slot * (Hk * G * S) + statistics, mask=exists, other=0.0)
            if SINGLE:
                p, grad_p, key = probabilities(
                    query, upstream, norm, keys, values, col, d, length, D, k_c, v_c, qk_scale, PRECISION
                )
                row_delta += tl.sum(p * grad_p, 1)
                grad_a = w * p * (grad_p - row_delta[:, None])
                total = tl.dot(grad_a.to(key.dtype), key, total, input_precision=PRECISION)
            else:
                for start in range(0, length, BLOCK_C):
                    p, grad_p, key = probabilities(
                        query, upstream, norm, keys, values, start + col, d, length, D, k_c, v_c, qk_scale, PRECISION
                    )
                    row_delta += tl.sum(p * grad_p, 1)
                for start in range(0, length, BLOCK_C):
                    p, grad_p, key = probabilities(
                        query, upstream, norm, keys, values, start + col, d, length, D, k_c, v_c, qk_scale, PRECISION
                    )
                    grad_a = w * p * (grad_p - row_delta[:, None])
                    total = tl.dot(grad_a.to(key.dtype), key, total, input_precision=PRECISION)
            tl.store(delta + slot * (Hk * G * S) + statistics, row_delta, mask=exists)
        tl.store(grad_w + (slot * Hk + head) * blocks + first // BLOCK_M, tl.sum(tl.where(exists, row_delta, 0.0), 0))
    tl.store(grad_q + base + rows[:, None] + d[None, :], (total * scale).to(grad_q.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_head", "heads"])
def key_kernel(
    q, k, v, weights, lengths, grad_out, lse, delta,
    order, piece_chunk, piece_start, piece_stop, piece_part, grad_k, grad_v, part_k, part_v,
    scale, qk_scale, first_head, heads, E, K, S, C, Hk, D,
    k_b, k_e, k_c, k_h, v_b, v_e, v_c, v_h,
    G: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of one piece, key tile and head: the result if the chunk has one piece, else a float32 part."""
    tiles = tl.cdiv(C, BLOCK_C)
    piece, tile = tl.program_id(0) // tiles // heads, tl.program_id(0) % tiles
    local = tl.program_id(0) // tiles % heads
    head = first_head + local
    start, stop = tl.load(piece_start + piece), tl.load(piece_stop + piece)
    if start < stop:
        place = tl.load(piece_chunk + piece).to(tl.int64)
        b, chunk = place // E, place % E
        length = chunk_length(lengths, chunk, b, E, C, HAS_LENGTHS)
        d, c = tl.arange(0, BLOCK_D), tile * BLOCK_C + tl.arange(0, BLOCK_C)
        key = load_tile(k + b * k_b + chunk * k_e + head * k_h, c, d, length, D, k_c)
        value = load_tile(v + b * v_b + chunk * v_e + head * v_h, c, d, length, D, v_c)
        sum_k, sum_v = tl.zeros([BLOCK_C, BLOCK_D], tl.float32), tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        for entry in range(start, stop):
            slot = tl.load(order + entry).to(tl.int64)
            w = tl.load(weights + slot)
            base = slot // K * (S * Hk * G * D)
            for first in range(0, S * G, BLOCK_M):
                rows, statistics, exists = row_offsets(first, head, S, D, Hk, G, BLOCK_M)
                mask = exists[:, None] & (d[None, :] < D)
                query = tl.load(q + base + rows[:, None] + d[None, :], mask=mask, other=0.0)
                norm = tl.load(lse + slot * (Hk * G * S) + statistics, mask=exists, other=0.0)
                score = tl.dot(key, tl.trans(query), input_precision=PRECISION) * qk_scale
                alive = (c[:, None] < length) & exists[None, :]
                p = tl.where(alive, w * tl.exp2(score - norm[None, :]), 0.0)
                upstream = tl.load(grad_out + base + rows[:, None] + d[None, :], mask=mask, other=0.0)
                sum_v = tl.dot(p.to(upstream.dtype), upstream, sum_v, input_precision=PRECISION)
                row_delta = tl.load(delta + slot * (Hk * G * S) + statistics, mask=exists, other=0.0)
                grad_p = tl.dot(value, tl.trans(upstream), input_precision=PRECISION)
                # Of a chunk without valid keys delta was never written: select, do not multiply by zero.
                grad_a = tl.where(alive, p * (grad_p - row_delta[None, :]), 0.0)
                sum_k = tl.dot(grad_a.to(query.dtype), query, sum_k, input_precision=PRECISION)
        mask = (c[:, None] < C) & (d[None, :] < D)
        part = tl.load(piece_part + piece)
        if part < 0:
            offset = ((place * C + c[:, None]) * Hk + head) * D + d[None, :]
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
