"""The forward kernel of grouped cross attention: chunks are read through the index, never gathered.

Notable: one program holds G S query rows of one query group and kv head, so decoding (S = 1) packs heads into rows.
With one key tile per chunk the denominator is known before the second product, the weight folds into P and a single
accumulator sums over all slots. Longer chunks use an online softmax of their own. Scores are in base 2.

Legend: B batch, N query groups, S rows of a group, Hk kv heads, G = H / Hk, D head size, E stored chunks, C keys of a
chunk, K retrieved chunks.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments are typed by Triton at launch.

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
    return (s * Hk * G + h) * D, h * S + s, row < S * G


@triton.jit
def chunk_length(lengths, chunk, b, E, C, HAS_LENGTHS: tl.constexpr):
    """Return the number of valid keys of a chunk; 0 for chunk -1."""
    if HAS_LENGTHS:
        return tl.load(lengths + b * E + chunk, mask=chunk >= 0, other=0)
    else:
        return tl.where(chunk >= 0, C, 0)


@triton.jit
def load_tile(base, col, d, length, D, stride):
    """Load keys or values ``[BLOCK_C, BLOCK_D]``; zeros beyond the length and the head size."""
    mask = (col[:, None] < length) & (d[None, :] < D)
    return tl.load(base + col[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def forward_kernel(
    q, k, v, indices, weights, lengths, out, lse,
    qk_scale, N, E, K, S, C, Hk, D,
    k_b, k_e, k_c, k_h, v_b, v_e, v_c, v_h,
    G: tl.constexpr, HAS_LENGTHS: tl.constexpr, OFF_BY_ONE: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write out ``[B, N, S, H, D]`` and the base 2 log-sum-exp ``[B, N, K, H, S]`` (0 at empty slots)."""
    b, head, n, first = split_program(tl.program_id(0), S * G, N, Hk, BLOCK_M)
    group = b * N + n
    rows, statistics, exists = row_offsets(first, head, S, D, Hk, G, BLOCK_M)
    d, col = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    mask = exists[:, None] & (d[None, :] < D)
    base = group.to(tl.int64) * (S * Hk * G * D)
    query = tl.load(q + base + rows[:, None] + d[None, :], mask=mask, other=0.0)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j in range(K):
        slot = group.to(tl.int64) * K + j
        chunk = tl.load(indices + slot).to(tl.int64)
        length = chunk_length(lengths, chunk, b, E, C, HAS_LENGTHS)
        if length > 0:
            w = tl.load(weights + slot)
            keys = k + b.to(tl.int64) * k_b + chunk * k_e + head * k_h
            values = v + b.to(tl.int64) * v_b + chunk * v_e + head * v_h
            if SINGLE:
                score = tl.dot(query, tl.trans(load_tile(keys, col, d, length, D, k_c)), input_precision=PRECISION)
                score = tl.where(col[None, :] < length, score * qk_scale, float("-inf"))
                peak = tl.max(score, 1)
                if OFF_BY_ONE:
                    peak = tl.maximum(peak, 0.0)
                p = tl.exp2(score - peak[:, None])
                norm = tl.sum(p, 1)
                if OFF_BY_ONE:
                    norm += tl.exp2(-peak)
                p *= (w / norm)[:, None]
                value = load_tile(values, col, d, length, D, v_c)
                total = tl.dot(p.to(value.dtype), value, total, input_precision=PRECISION)
            else:
                peak = tl.zeros([BLOCK_M], tl.float32)
                norm = tl.zeros([BLOCK_M], tl.float32)
                if OFF_BY_ONE:
                    norm += 1.0
                else:
                    peak += float("-inf")
                part = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
                for start in range(0, length, BLOCK_C):
                    c = start + col
                    score = tl.dot(query, tl.trans(load_tile(keys, c, d, length, D, k_c)), input_precision=PRECISION)
                    score = tl.where(c[None, :] < length, score * qk_scale, float("-inf"))
                    higher = tl.maximum(peak, tl.max(score, 1))
                    shrink = tl.exp2(peak - higher)
                    p = tl.exp2(score - higher[:, None])
                    norm = norm * shrink + tl.sum(p, 1)
                    value = load_tile(values, c, d, length, D, v_c)
                    part = tl.dot(p.to(value.dtype), value, part * shrink[:, None], input_precision=PRECISION)
                    peak = higher
                total += part * (w / norm)[:, None]
            tl.store(lse + slot * (Hk * G * S) + statistics, peak + tl.log2(norm), mask=exists)
        else:
            tl.store(lse + slot * (Hk * G * S) + statistics, tl.zeros([BLOCK_M], tl.float32), mask=exists)
    tl.store(out + base + rows[:, None] + d[None, :], total.to(out.dtype.element_ty), mask=mask)
