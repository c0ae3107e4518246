// Grouped-query attention of rows over a paged cache, and storing their keys and values in it.
//
// A row is one query token with all its heads; it sees the entries `first .. last - 1` of its own sequence. Dot products
// are summed over sixteen lanes, softmax and the sum of values in the order of the positions, all in float32: a row's
// bits depend on the row and the entries that it sees alone. No other entries are read.
#include "simd.h"

#include "exponential.h"

namespace {

INLINE float total(F16 lanes) {
    float v[PANEL];
    store(v, lanes);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) v[i] += v[i + width];
    return v[0];
}

// Scores [count] to weights that are not normalised yet; returns their sum.
float exponentials(float* scores, int64_t count) {
    float largest = scores[0];
    for (int64_t t = 1; t < count; t++) largest = scores[t] > largest ? scores[t] : largest;
    int64_t padded = round_up(count, PANEL);
    for (int64_t t = count; t < padded; t++) scores[t] = 0;
    for (int64_t t = 0; t < padded; t++) {
        float x = scores[t] - largest;
        float weight = exp_of(x);
        scores[t] = x == x ? weight : x;  // a NaN stays one
    }
    for (int64_t t = count; t < padded; t++) scores[t] = 0;
    F16 sums = zeros();
    for (int64_t t = 0; t < padded; t += PANEL) sums = fma(load(scores + t), 1.0f, sums);
    return total(sums);
}

struct Cache {
    int64_t head_stride, block_size, head_dim, heads, kv_heads;
};

INLINE void to_floats(const float* x, int64_t count, float* out) { memcpy(out, x, count * 4); }
INLINE void to_floats(const bf16* x, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i++) out[i] = widen(x[i]);
}
INLINE void from_floats(const float* x, int64_t count, float* out) { memcpy(out, x, count * 4); }
INLINE void from_floats(const float* x, int64_t count, bf16* out) {
    for (int64_t i = 0; i < count; i++) out[i] = narrow(x[i]);
}

struct Seen {
    const int64_t* table;
    int64_t first, last;
    int64_t count() const { return last - first; }
};

// Call `use(entry, how many, index of the first)` for every run of seen entries that lie in one block.
template <typename Float, typename Use>
INLINE void each_run(const Float* entries, const Seen& seen, const Cache& c, Use use) {
    for (int64_t start = seen.first; start < seen.last;) {
        int64_t offset = start % c.block_size, stop = least(start - offset + c.block_size, seen.last);
        const Float* entry = entries + (seen.table[start / c.block_size] * c.block_size + offset) * c.head_dim;
        use(entry, stop - start, start - seen.first);
        start = stop;
    }
}

// Sixteen times BLOCKS elements of the weighted sum of the values, in the order of the positions.
template <int BLOCKS, typename Float>
void weighted_sum(const Float* values, const Seen& seen, const Cache& c, const float* weights, float* out) {
    F16 lanes[BLOCKS];
    for (int b = 0; b < BLOCKS; b++) lanes[b] = zeros();
    each_run(values, seen, c, [&](const Float* value, int64_t count, int64_t index) {
        for (int64_t t = 0; t < count; t++, value += c.head_dim)
#pragma GCC unroll 4
            for (int b = 0; b < BLOCKS; b++) lanes[b] = fma(load(value + b * PANEL), weights[index + t], lanes[b]);
    });
    for (int b = 0; b < BLOCKS; b++) store(out + b * PANEL, lanes[b]);
}

// One row and one key/value head with its group of queries. Scratch: q and one entry, scores of the group, output.
template <typename Float>
void attend(const Float* q, const Float* keys, const Float* values, const Seen& seen, const Cache& c, float scale,
            Float* out, float* scratch) {
    int64_t group = c.heads / c.kv_heads, dim = c.head_dim, stride = round_up(seen.count(), PANEL);
    float *queries = scratch, *entry = queries + group * dim, *sums = entry + dim, *scores = sums + dim;
    for (int64_t g = 0; g < group; g++) to_floats(q + g * dim, dim, queries + g * dim);
    each_run(keys, seen, c, [&](const Float* key, int64_t count, int64_t index) {
        for (int64_t t = 0; t < count; t++, key += dim) {
            __builtin_prefetch(key + 4 * dim);
            to_floats(key, dim, entry);
            for (int64_t g = 0; g < group; g++) {
                F16 lanes = zeros();
                for (int64_t d = 0; d < dim; d += PANEL)
                    lanes = fma(load(queries + g * dim + d), load(entry + d), lanes);
                scores[g * stride + index + t] = total(lanes) * scale;
            }
        }
    });
    for (int64_t g = 0; g < group; g++) {
        float* weights = scores + g * stride;
        float sum = exponentials(weights, seen.count());
        int64_t d = 0;
        for (; d + 4 * PANEL <= dim; d += 4 * PANEL) weighted_sum<4>(values + d, seen, c, weights, sums + d);
        for (; d < dim; d += PANEL) weighted_sum<1>(values + d, seen, c, weights, sums + d);
        for (d = 0; d < dim; d++) sums[d] /= sum;
        from_floats(sums, dim, out + g * dim);
    }
}

template <typename Float>
void attend_rows(const Float* q, int64_t q_stride, const Float* keys, const Float* values, const Cache& c,
                 const int64_t* tables, int64_t width, const int64_t* sequences, const int64_t* first,
                 const int64_t* last, int64_t rows, Float* out, int threads) {
    int64_t group = c.heads / c.kv_heads, longest = 0, work = 0;
    for (int64_t r = 0; r < rows; r++) {
        int64_t count = last[r] - first[r];
        longest = count > longest ? count : longest;
        work += count * c.heads * c.head_dim;
    }
    if (work < 1 << 17) threads = 1;
    float scale = (float)(1 / sqrt((double)c.head_dim));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* scratch = allocate<float>((group + 2) * c.head_dim + group * round_up(longest, PANEL));
#pragma omp for schedule(static, 1)
        for (int64_t item = 0; item < rows * c.kv_heads; item++) {
            int64_t r = item / c.kv_heads, h = item % c.kv_heads, place = h * group * c.head_dim;
            Float* own = out + r * c.heads * c.head_dim + place;
            Seen seen = {tables + sequences[r] * width, first[r], last[r]};
            if (seen.count() == 0) {
                memset((void*)own, 0, group * c.head_dim * sizeof(Float));
                continue;
            }
            attend(q + r * q_stride + place, keys + h * c.head_stride, values + h * c.head_stride, seen, c, scale, own,
                   scratch);
        }
        free(scratch);
    }
}

}  // namespace

// q: rows of heads * head_dim, q_stride apart; keys and values [kv_heads, blocks, block_size, head_dim] with heads
// head_stride apart; tables [sequences, width]; row r sees the entries first[r] .. last[r] - 1 of sequence sequences[r];
// if that is none, its result is zero. head_dim is a multiple of 16. out [rows, heads * head_dim].
EXPORT void attention(int is_bf16, const void* q, int64_t q_stride, const void* keys, const void* values,
                      int64_t head_stride, int64_t block_size, int64_t head_dim, int64_t heads, int64_t kv_heads,
                      const int64_t* tables, int64_t width, const int64_t* sequences, const int64_t* first,
                      const int64_t* last, int64_t rows, void* out, int threads) {
    Cache c = {head_stride, block_size, head_dim, heads, kv_heads};
    if (is_bf16)
        attend_rows((const bf16*)q, q_stride, (const bf16*)keys, (const bf16*)values, c, tables, width, sequences,
                    first, last, rows, (bf16*)out, threads);
    else
        attend_rows((const float*)q, q_stride, (const float*)keys, (const float*)values, c, tables, width, sequences,
                    first, last, rows, (float*)out, threads);
}

// Rows of a cache [.., head_dim] from k and v [rows, kv_heads, head_dim], whose rows are k_stride and v_stride apart.
EXPORT void store_entries(int64_t size, const void* k, int64_t k_stride, const void* v, int64_t v_stride,
                          const int64_t* cache_rows, int64_t rows, int64_t kv_heads, int64_t head_dim, void* keys,
                          void* values) {
    int64_t bytes = head_dim * size;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t h = 0; h < kv_heads; h++) {
            int64_t place = cache_rows[r * kv_heads + h] * bytes;
            memcpy((char*)keys + place, (const char*)k + (r * k_stride + h * head_dim) * size, bytes);
            memcpy((char*)values + place, (const char*)v + (r * v_stride + h * head_dim) * size, bytes);
        }
}
