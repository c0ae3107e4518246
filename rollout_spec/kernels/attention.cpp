// Grouped-query attention of rows over a paged cache, and storing their keys and values in it.
//
// A row is one query token with all its heads; it sees the entries `first .. last - 1` of its own sequence. Dot
// products are summed in the order of the dimensions, part by part, and values in the order of the positions, all in
// float32: a row's bits depend on the row and the entries that it sees alone. Rows of one sequence that follow each
// other, as in verification, share the work of reading its entries, from the first that one of them sees to the last.
#include <type_traits>

#include "kernels.h"
#include "lanes.h"
#include "layout.h"
#include "tile.h"

namespace {

constexpr int64_t CHUNK = PANEL;     // entries that are read at a time
constexpr int64_t MOST_ROWS = 8;     // that share them
constexpr int MOST_QUERIES = 6;      // whose sums find room in the registers
constexpr int64_t PART = 16;         // dimensions that are summed before they are added to the others
constexpr int64_t SCORES = 1 << 16;  // of all heads of such rows; more do not stay in the core's own cache

INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE float total(F16 sums) {
    float v[PANEL];
    store(v, sums);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) v[i] += v[i + width];
    return v[0];
}

// Scores [count], with room for a multiple of sixteen, to weights that are not normalised yet; returns their sum.
float exponentials(float* scores, int64_t count) {
    int64_t padded = round_up(count, PANEL);
    for (int64_t t = count; t < padded; t++) scores[t] = scores[0];
    Floats highest = lanes(scores, LANES);
    for (int64_t t = 0; t < padded; t += LANES) {
        Floats v = lanes(scores + t, LANES);
        highest = v > highest ? v : highest;
    }
    float largest = highest[0];
    for (int64_t i = 1; i < LANES; i++) largest = highest[i] > largest ? highest[i] : largest;
    for (int64_t t = 0; t < padded; t += LANES) put(exp_of(lanes(scores + t, LANES) - largest), LANES, scores + t);
    for (int64_t t = count; t < padded; t++) scores[t] = 0;
    F16 sums = zeros();
    for (int64_t t = 0; t < padded; t += PANEL) sums = fma(load(scores + t), 1.0f, sums);
    return total(sums);
}

// What a line of sixteen keys is multiplied with: as many numbers of a query as it holds of a key.
template <typename Float>
using Operand = std::conditional_t<sizeof(Float) == 2, bf16_operand, float>;
template <typename Float>
constexpr int64_t IN_LINE = sizeof(uint32_t) / sizeof(Float);

// The products of ROWS queries and sixteen keys, times scale: out [ROWS, 16].
template <typename Float, int ROWS>
void scores_of(const Float* keys, const Operand<Float>* queries, int64_t dim, float scale, float* out) {
    F16 sums[ROWS];
    for (int r = 0; r < ROWS; r++) sums[r] = zeros();
    for (int64_t d = 0; d < dim;) {
        F16 part[ROWS][1];
        for (int r = 0; r < ROWS; r++) part[r][0] = zeros();
        for (int64_t stop = d + PART; d < stop; d += IN_LINE<Float>) line(keys + d * PANEL, queries + d * ROWS, part);
        for (int r = 0; r < ROWS; r++) sums[r] = fma(part[r][0], 1.0f, sums[r]);
    }
    for (int r = 0; r < ROWS; r++) store(out + r * PANEL, scaled(sums[r], scale));
}

template <typename Float, int ROWS>
struct Tiles {
    static void run(int64_t rows, const Float* keys, const Operand<Float>* queries, int64_t dim, float scale,
                    float* out) {
        if (rows == ROWS) scores_of<Float, ROWS>(keys, queries, dim, scale, out);
        else Tiles<Float, ROWS - 1>::run(rows, keys, queries, dim, scale, out);
    }
};
template <typename Float>
struct Tiles<Float, 0> {
    static void run(int64_t, const Float*, const Operand<Float>*, int64_t, float, float*) {}
};

// Sixteen times BLOCKS elements of `sums`, to which `count` weighted values are added in their order.
template <int BLOCKS>
INLINE void add_weighted(const float* values, int64_t count, int64_t dim, const float* weights, float* sums) {
    F16 lanes[BLOCKS];
    for (int b = 0; b < BLOCKS; b++) lanes[b] = load(sums + b * PANEL);
    for (int64_t t = 0; t < count; t++, values += dim)
        for (int b = 0; b < BLOCKS; b++) lanes[b] = fma(load(values + b * PANEL), weights[t], lanes[b]);
    for (int b = 0; b < BLOCKS; b++) store(sums + b * PANEL, lanes[b]);
}

INLINE const float* floats(const float* x, int64_t, float*) { return x; }
INLINE const float* floats(const bf16* x, int64_t count, float* scratch) {
    for (int64_t i = 0; i < count; i++) scratch[i] = widen(x[i]);
    return scratch;
}
INLINE void put(const float* x, float divisor, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i++) out[i] = x[i] / divisor;
}
INLINE void put(const float* x, float divisor, int64_t count, bf16* out) {
    for (int64_t i = 0; i < count; i++) out[i] = narrow(x[i] / divisor);
}

// The arguments of `attention`.
template <typename Float>
struct Call {
    const Float *q, *keys, *values;
    int64_t q_stride, head_stride, block_size, dim, heads, kv_heads;
    const int64_t* tables;
    int64_t width;
    const int64_t *sequences, *first, *last;
    int64_t rows;
    Float* out;

    int64_t group() const { return heads / kv_heads; }

    // Call `use(entries, position of the first, and behind the last)` for `start .. stop - 1`, in order.
    template <typename Use>
    void each_chunk(const Float* entries, const int64_t* table, int64_t start, int64_t stop, Use use) const {
        while (start < stop) {
            int64_t offset = start % block_size, count = least(least(block_size - offset, CHUNK), stop - start);
            use(entries + (table[start / block_size] * block_size + offset) * dim, start, start + count);
            start += count;
        }
    }

    // `count` keys, and zeros for those that sixteen lack, to lines of sixteen; `whole` has room for sixteen keys.
    void to_lines(const Float* keys, int64_t count, Float* whole, Float* lines) const {
        if (count < PANEL) {
            memcpy(whole, keys, count * dim * sizeof(Float));
            memset(whole + count * dim, 0, (PANEL - count) * dim * sizeof(Float));
            keys = whole;
        }
        int64_t words = dim / IN_LINE<Float>;
        rows_to_lines((const uint32_t*)keys, words, words, (uint32_t*)lines);
    }

    // Floats that `count` rows need.
    int64_t scratch(int64_t count, int64_t stride) const {
        return 2 * CHUNK * dim + MOST_QUERIES * PANEL + count * group() * (3 * dim + 1 + stride);
    }

    // `count` rows of one sequence with one key/value head and its group of queries; scores are `stride` apart.
    void attend(int64_t row, int64_t count, int64_t head, int64_t stride, float* scratch) const {
        int64_t queries = count * group(), start = INT64_MAX, stop = 0;
        float *chunk = scratch, *whole = chunk + CHUNK * dim, *products = whole + CHUNK * dim;
        float *sums = products + MOST_QUERIES * PANEL, *own = sums + queries * dim, *scores = own + 2 * queries * dim;
        float* divisors = scores + queries * stride;
        Operand<Float>* interleaved = (Operand<Float>*)(own + queries * dim);
        const int64_t *table = tables + sequences[row] * width, *begin = first + row, *end = last + row;
        float scale = (float)(1 / sqrt((double)dim));
        Tiling tiling(queries, MOST_QUERIES);

        for (int64_t r = 0; r < count; r++) {
            if (begin[r] < end[r]) start = least(start, begin[r]), stop = most(stop, end[r]);
            memcpy((Float*)own + r * group() * dim, q + (row + r) * q_stride + head * group() * dim,
                   group() * dim * sizeof(Float));
        }
        for (int64_t t = 0; t < tiling.count; t++) {
            int64_t at = tiling.start(t) * dim;
            interleave((Float*)own + at, dim, dim, tiling.height(t), interleaved + at);
        }
        each_chunk(keys + head * head_stride, table, start, stop, [&](const Float* entries, int64_t from, int64_t to) {
            Float* lines = (Float*)chunk;
            to_lines(entries, to - from, (Float*)whole, lines);
            for (int64_t t = 0; t < tiling.count; t++) {
                int64_t at = tiling.start(t), height = tiling.height(t);
                Tiles<Float, MOST_QUERIES>::run(height, lines, interleaved + at * dim, dim, scale, products);
                for (int64_t i = 0, r = at / group(); i < height; i++) {
                    if (at + i == (r + 1) * group()) r++;
                    int64_t low = most(from, begin[r]), high = least(to, end[r]);
                    const float* seen = products + i * PANEL + low - from;
                    float* kept = scores + (at + i) * stride + low - begin[r];
                    if (high - low == PANEL) memcpy(kept, seen, PANEL * sizeof(float));  // a copy of known size is fast
                    else if (high > low) memcpy(kept, seen, (high - low) * sizeof(float));
                }
            }
        });
        for (int64_t i = 0; i < queries; i++) {
            int64_t seen = end[i / group()] - begin[i / group()];
            divisors[i] = seen > 0 ? exponentials(scores + i * stride, seen) : 1;
        }
        memset(sums, 0, queries * dim * sizeof(float));
        each_chunk(values + head * head_stride, table, start, stop, [&](const Float* stored, int64_t from, int64_t to) {
            const float* entries = floats(stored, (to - from) * dim, chunk);
            for (int64_t r = 0; r < count; r++) {
                int64_t low = most(from, begin[r]), high = least(to, end[r]);
                const float* seen = entries + (low - from) * dim;
                for (int64_t i = r * group(), d = 0; i < (r + 1) * group(); i++, d = 0) {
                    const float* weights = scores + i * stride + low - begin[r];
                    for (; d + 4 * PANEL <= dim; d += 4 * PANEL)
                        add_weighted<4>(seen + d, high - low, dim, weights, sums + i * dim + d);
                    for (; d < dim; d += PANEL) add_weighted<1>(seen + d, high - low, dim, weights, sums + i * dim + d);
                }
            }
        });
        for (int64_t i = 0; i < queries; i++) {
            int64_t r = row + i / group(), h = head * group() + i % group();
            put(sums + i * dim, divisors[i], dim, out + (r * heads + h) * dim);
        }
    }

    void run(int threads) const {
        int64_t longest = 0, work = 0;
        for (int64_t r = 0; r < rows; r++) {
            longest = most(longest, last[r] - first[r]);
            work += (last[r] - first[r]) * heads * dim;
        }
        int64_t stride = round_up(most(longest, 1), PANEL);
        int64_t limit = most(1, least(MOST_ROWS, SCORES / (group() * stride)));
        int64_t *starts = allocate<int64_t>(rows + 1), tiles = 0;
        for (int64_t r = 0; r < rows; r++)
            if (r == 0 || sequences[r] != sequences[r - 1] || r - starts[tiles - 1] == limit) starts[tiles++] = r;
        starts[tiles] = rows;
        if (work < 1 << 15) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            float* own = allocate<float>(scratch(limit, stride));
#pragma omp for schedule(static, 1)
            for (int64_t item = 0; item < tiles * kv_heads; item++) {
                int64_t tile = item / kv_heads, row = starts[tile];
                attend(row, starts[tile + 1] - row, item % kv_heads, stride, own);
            }
            free(own);
        }
        free(starts);
    }
};

}  // namespace

// q: rows of heads * head_dim, q_stride apart; keys and values [kv_heads, blocks, block_size, head_dim] with heads
// head_stride apart; tables [sequences, width]; row r sees the entries first[r] .. last[r] - 1 of sequence sequences[r];
// if that is none, its result is zero. head_dim is a multiple of 16. out [rows, heads * head_dim].
EXPORT void attention(int is_bf16, const void* q, int64_t q_stride, const void* keys, const void* values,
                      int64_t head_stride, int64_t block_size, int64_t head_dim, int64_t heads, int64_t kv_heads,
                      const int64_t* tables, int64_t width, const int64_t* sequences, const int64_t* first,
                      const int64_t* last, int64_t rows, void* out, int threads) {
    auto run = [&](auto* q, auto* keys, auto* values, auto* out) {
        Call<std::remove_pointer_t<decltype(out)>> call = {q, keys, values, q_stride, head_stride, block_size, head_dim,
                                                           heads, kv_heads, tables, width, sequences, first, last, rows,
                                                           out};
        call.run(threads);
    };
    if (is_bf16) run((const bf16*)q, (const bf16*)keys, (const bf16*)values, (bf16*)out);
    else run((const float*)q, (const float*)keys, (const float*)values, (float*)out);
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
