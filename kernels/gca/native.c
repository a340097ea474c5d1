/* Grouped cross attention of one kv head in float32, forward and backward, for one core.
 *
 * Notable: the slots come sorted by chunk, so that a chunk is laid out for its products once and then serves every
 * query group that chose it while it stays in the cache; query rows stream by. One product routine with a register
 * tile does all the work: A is broadcast, so it may be transposed for free; B and C have contiguous columns. Vectors
 * are those of GCC and Clang, not of one processor. Nothing is allocated here. A fixed order of sums: two runs give
 * identical bits.
 *
 * Legend: R query rows of a group, C keys of a chunk, P = C rounded up to whole vectors, D head size, whole vectors.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* A register tile of ROWS x VECTORS accumulators fills the registers: 24 of 32, or 12 of 16. */
#if defined(__AVX512F__)
enum { WIDTH = 16, VECTORS = 4, ROWS = 6 };
#else
enum { WIDTH = 8, VECTORS = 2, ROWS = 6 };
#endif
enum { BLOCK = 64 }; /* query rows whose scores are formed at a time */

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t mask __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t quad_mask __attribute__((vector_size(16), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    int64_t entries, top_k, rows, keys, dim;
    float scale;
    int32_t off_by_one;
    const int64_t *chunks, *slots; /* [entries], sorted by chunk, then by slot */
    const int64_t *lengths;        /* valid keys of each chunk */
    const float *weights;          /* of each slot */
    float *scratch;                /* gca_scratch() floats */
} Problem;

static const float LOG2E = 1.44269504f;

INLINE vec splat(float x) { return x - (vec){0}; }

INLINE vec choose(mask condition, vec yes, vec no) {
    vec result;
    for (int i = 0; i < WIDTH; i++) result[i] = condition[i] ? yes[i] : no[i]; /* becomes one blend */
    return result;
}

INLINE float sum_lanes(vec x) {
    quad parts[WIDTH / 4];
    memcpy(parts, &x, sizeof x);
    quad sum = parts[0];
#pragma GCC unroll 4
    for (int i = 1; i < WIDTH / 4; i++) sum += parts[i];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

INLINE float max_lanes(vec x) {
    quad parts[WIDTH / 4];
    memcpy(parts, &x, sizeof x);
    quad top = parts[0];
#pragma GCC unroll 4
    for (int i = 1; i < WIDTH / 4; i++) {
        quad_mask first = top > parts[i];
        top = (quad)((first & (quad_mask)top) | (~first & (quad_mask)parts[i]));
    }
    float even = top[0] > top[2] ? top[0] : top[2], odd = top[1] > top[3] ? top[1] : top[3];
    return even > odd ? even : odd;
}

/* 2^x for x < 128, never below 2^-126; NaN stays NaN. With x = n + f, |f| <= 1/2: a polynomial of f (relative error
 * 5e-9), whose exponent bits n is added to. */
INLINE vec exp2_lanes(vec x) {
    x = choose(x < -126.0f, splat(-126.0f), x);
    vec shifted = x + 12582912.0f; /* 1.5 * 2^23: the lowest bits hold n */
    vec f = x - (shifted - 12582912.0f);
    vec p = f * 1.5453163e-4f + 1.3390863e-3f;
    p = p * f + 9.6180830e-3f;
    p = p * f + 5.5503570e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return (vec)((mask)p + ((mask)shifted << 23));
}

/* c[r][j] (+)= sum_d a[r * a_row + d * a_col] * b[d][j] for a register tile of `rows` x `vectors` vectors. */
INLINE void tile(const int rows, const int vectors, int64_t depth, const float *a, int64_t a_row, int64_t a_col,
                 const float *b, int64_t b_row, float *c, int64_t c_row, int add) {
    vec sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++) sum[r][j] = add ? *(const vec *)(c + r * c_row + j * WIDTH) : splat(0.0f);
    for (int64_t d = 0; d < depth; d++) {
        vec right[VECTORS];
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++) right[j] = *(const vec *)(b + d * b_row + j * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            vec left = splat(a[r * a_row + d * a_col]);
#pragma GCC unroll 8
            for (int j = 0; j < vectors; j++) sum[r][j] += left * right[j];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++) *(vec *)(c + r * c_row + j * WIDTH) = sum[r][j];
}

/* C[rows, cols] (+)= A[rows, depth] B[depth, cols]; cols is a multiple of WIDTH. */
static void product(int64_t rows, int64_t cols, int64_t depth, const float *a, int64_t a_row, int64_t a_col,
                    const float *b, int64_t b_row, float *c, int64_t c_row, int add) {
    for (int64_t j = 0, step; j < cols; j += step) {
        step = j + VECTORS * WIDTH <= cols ? VECTORS * WIDTH : WIDTH;
        for (int64_t r = 0, height; r < rows; r += height) {
            const float *left = a + r * a_row;
            float *target = c + r * c_row + j;
            height = r + ROWS <= rows ? ROWS : 1;
            if (height == ROWS && step > WIDTH)
                tile(ROWS, VECTORS, depth, left, a_row, a_col, b + j, b_row, target, c_row, add);
            else if (height == ROWS)
                tile(ROWS, 1, depth, left, a_row, a_col, b + j, b_row, target, c_row, add);
            else if (step > WIDTH)
                tile(1, VECTORS, depth, left, a_row, a_col, b + j, b_row, target, c_row, add);
            else
                tile(1, 1, depth, left, a_row, a_col, b + j, b_row, target, c_row, add);
        }
    }
}

INLINE int64_t padded(int64_t keys) { return (keys + WIDTH - 1) / WIDTH * WIDTH; }

/* factor x, [C, D] to [D, P]; columns beyond C are zero. */
static void transpose(const Problem *problem, const float *x, float factor, float *y) {
    int64_t width = padded(problem->keys);
    for (int64_t d = 0; d < problem->dim; d++) {
        for (int64_t c = 0; c < problem->keys; c++) y[d * width + c] = factor * x[c * problem->dim + d];
        for (int64_t c = problem->keys; c < width; c++) y[d * width + c] = 0.0f;
    }
}

INLINE void hide_dead_keys(float *scores, int64_t rows, int64_t length, int64_t width) {
    for (int64_t r = 0; r < rows && length < width; r++)
        for (int64_t c = length; c < width; c++) scores[r * width + c] = -INFINITY;
}

/* Turn base 2 scores into w softmax; writes the peak and the denominator of each row. The passes over the rows are
 * apart, so that no row waits for the sums of the one before. */
static void softmax(float *scores, int64_t rows, int64_t width, float weight, int off_by_one, float *peak, float *total) {
    for (int64_t r = 0; r < rows; r++) {
        vec top = splat(-INFINITY);
        for (int64_t c = 0; c < width; c += WIDTH) {
            vec x = *(vec *)(scores + r * width + c);
            top = choose(top > x, top, x);
        }
        peak[r] = max_lanes(top);
        if (off_by_one && peak[r] < 0.0f) peak[r] = 0.0f;
    }
    for (int64_t r = 0; r < rows; r++) {
        vec sum = splat(0.0f);
        for (int64_t c = 0; c < width; c += WIDTH) {
            vec *x = (vec *)(scores + r * width + c);
            *x = exp2_lanes(*x - peak[r]);
            sum += *x;
        }
        total[r] = sum_lanes(sum) + (off_by_one ? exp2f(-peak[r]) : 0.0f);
    }
    for (int64_t r = 0; r < rows; r++) {
        float factor = weight / total[r];
        for (int64_t c = 0; c < width; c += WIDTH) *(vec *)(scores + r * width + c) *= factor;
    }
}

/* Turn base 2 scores and dP into w P and dA, given the log-sum-exp of each row; returns the sum of all P dP. */
static float differentiate(float *scores, float *grads, int64_t rows, int64_t width, float weight, float scale,
                           const float *lse) {
    float delta[BLOCK], sum_of_rows = 0.0f;
    for (int64_t r = 0; r < rows; r++) {
        vec sum = splat(0.0f);
        for (int64_t c = 0; c < width; c += WIDTH) {
            vec *x = (vec *)(scores + r * width + c);
            *x = exp2_lanes(*x - lse[r]);
            sum += *x * *(vec *)(grads + r * width + c);
        }
        delta[r] = sum_lanes(sum);
        sum_of_rows += delta[r];
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < width; c += WIDTH) {
            vec *p = (vec *)(scores + r * width + c), *grad = (vec *)(grads + r * width + c);
            *p *= weight;
            *grad = *p * (*grad - delta[r]) * scale;
        }
    return sum_of_rows;
}

/* Floats of scratch memory of one call. */
int64_t gca_scratch(const Problem *problem) {
    int64_t width = padded(problem->keys);
    return 2 * (problem->dim + BLOCK) * width + 2 * problem->keys * problem->dim;
}

/* q [groups, R, D]; k, v [chunks, C, D]; out, alike q, is added to; peak and total [slots, R] of filled slots. */
void gca_forward(const Problem *problem, const float *q, const float *k, const float *v, float *out, float *peak,
                 float *total) {
    int64_t rows = problem->rows, dim = problem->dim, size = problem->keys * dim, width = padded(problem->keys);
    float *keys = problem->scratch, *scores = keys + dim * width;
    for (int64_t i = 0; i < problem->entries; i++) {
        int64_t chunk = problem->chunks[i], slot = problem->slots[i], length = problem->lengths[chunk];
        if (i == 0 || chunk != problem->chunks[i - 1])
            transpose(problem, k + chunk * size, problem->scale * LOG2E, keys);
        for (int64_t first = 0; first < rows; first += BLOCK) {
            int64_t count = rows - first < BLOCK ? rows - first : BLOCK, place = slot * rows + first;
            int64_t offset = (slot / problem->top_k * rows + first) * dim;
            product(count, width, dim, q + offset, dim, 1, keys, width, scores, width, 0);
            hide_dead_keys(scores, count, length, width);
            softmax(scores, count, width, problem->weights[slot], problem->off_by_one, peak + place, total + place);
            product(count, dim, length, scores, width, 1, v + chunk * size, dim, out + offset, dim, 1);
        }
    }
}

/* k and v of the chunks in the list become dk and dv; grad_q, alike q, and grad_w [slots] are added to. */
void gca_backward(const Problem *problem, const float *grad_out, const float *q, const float *lse, float *k, float *v,
                  float *grad_q, float *grad_w) {
    int64_t rows = problem->rows, dim = problem->dim, size = problem->keys * dim, width = padded(problem->keys);
    float *keys = problem->scratch, *values = keys + dim * width, *scores = values + dim * width;
    float *grads = scores + BLOCK * width, *sum_k = grads + BLOCK * width, *sum_v = sum_k + size;
    for (int64_t i = 0; i < problem->entries; i++) {
        int64_t chunk = problem->chunks[i], slot = problem->slots[i], length = problem->lengths[chunk];
        if (i == 0 || chunk != problem->chunks[i - 1]) {
            transpose(problem, k + chunk * size, problem->scale * LOG2E, keys);
            transpose(problem, v + chunk * size, 1.0f, values);
            memset(sum_k, 0, 2 * size * sizeof(float));
        }
        for (int64_t first = 0; first < rows; first += BLOCK) {
            int64_t count = rows - first < BLOCK ? rows - first : BLOCK, place = slot * rows + first;
            int64_t offset = (slot / problem->top_k * rows + first) * dim;
            product(count, width, dim, q + offset, dim, 1, keys, width, scores, width, 0);
            product(count, width, dim, grad_out + offset, dim, 1, values, width, grads, width, 0);
            hide_dead_keys(scores, count, length, width);
            grad_w[slot] += differentiate(scores, grads, count, width, problem->weights[slot], problem->scale, lse + place);
            product(count, dim, length, grads, width, 1, k + chunk * size, dim, grad_q + offset, dim, 1);
            product(length, dim, count, grads, 1, width, q + offset, dim, sum_k, dim, 1);
            product(length, dim, count, scores, 1, width, grad_out + offset, dim, sum_v, dim, 1);
        }
        if (i + 1 == problem->entries || chunk != problem->chunks[i + 1]) {
            memcpy(k + chunk * size, sum_k, size * sizeof(float));
            memcpy(v + chunk * size, sum_v, size * sizeof(float));
        }
    }
}
