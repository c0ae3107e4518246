// Products of a few rows with sixteen columns at a time, each a chain of multiply-adds in float32 in its order: what
// linears and attention share.
#pragma once
#include "simd.h"

namespace {

// Rows in tiles of nearly equal height, at most `most`.
struct Tiling {
    int64_t rows, count;
    Tiling(int64_t rows, int64_t most) : rows(rows), count((rows + most - 1) / most) {}
    int64_t start(int64_t tile) const { return tile * (rows / count) + least(tile, rows % count); }
    int64_t height(int64_t tile) const { return rows / count + (tile < rows % count); }
};

// What one step of a dot product reads of a row: one column, or a pair of them.
constexpr int64_t UNIT = 2 / LINE_PARTS;

// Rows of a tile as the dot products read them, [k / UNIT, height, UNIT]; a zero follows an odd number of columns.
template <typename Float>
[[maybe_unused]] void interleave(const Float* x, int64_t k, int64_t padded, int64_t height, float* out) {
    for (int64_t r = 0; r < height; r++) {
        for (int64_t i = 0; i < k; i++) out[i * height + r] = widen(x[r * k + i]);
        if (padded > k) out[k * height + r] = 0;
    }
}
[[maybe_unused]] void interleave(const bf16* x, int64_t k, int64_t padded, int64_t height, bf16* out) {
    for (int64_t r = 0; r < height; r++) {
        bf16* place = out + 2 * r;
        for (int64_t i = 0; i + 1 < k; i += 2, place += 2 * height) memcpy(place, x + r * k + i, 2 * sizeof(bf16));
        if (padded > k) place[0] = x[r * k + k - 1], place[1] = 0;
    }
}

// One line of every panel times ROWS rows.
template <int ROWS, int PANELS>
INLINE void line(const bf16* w, const bf16_operand* x, F16 (&sums)[ROWS][PANELS]) {
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++) {
#pragma GCC unroll 2
        for (int part = 0; part < LINE_PARTS; part++) {
            LinePart weights = load_part(w + p * 2 * PANEL, part);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) sums[r][p] = dot(sums[r][p], weights, x + (part * ROWS + r) * UNIT);
        }
    }
}

// The same for columns of float32, which do not lie in pairs.
template <int ROWS>
INLINE void line(const float* w, const float* x, F16 (&sums)[ROWS][1]) {
    F16 weights = load(w);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) sums[r][0] = fma(weights, x[r], sums[r][0]);
}

}  // namespace
