// Rows of a bf16 product in tile registers: sixteen of them together, 32 columns at a time.
#pragma once
#include "bf16_work.h"
#include "tile_registers.h"

namespace {

// Rows that go together, and the multiple of columns that their products need.
constexpr int64_t ROWS_TOGETHER = REGISTER_ROWS, COLUMNS = 32, FEW_ROWS = REGISTER_ROWS;
constexpr Tile FEW = {1, 4}, MANY = {2, 2};  // rows in registers
constexpr int64_t LINES = COLUMNS / 2;  // of a panel, in a register
static_assert(CHUNK % LINES == 0, "a chunk is whole registers");

// The lines of a register for `m` rows.
int64_t height_of(int64_t m) { return least(m, REGISTER_ROWS); }

// `count` rows as registers read them, [registers, padded / 32, height, 32]; zeros are where no rows and columns are.
void lay_out(const bf16* x, int64_t k, int64_t padded, int64_t count, int64_t height, bf16* out) {
    for (int64_t first = 0; first < count; first += height)
        for (int64_t i = 0; i < padded; i += COLUMNS)
            for (int64_t r = first; r < first + height; r++, out += COLUMNS) {
                int64_t there = r < count ? least(COLUMNS, k - i) : 0;
                memcpy(out, x + r * k + i, there * sizeof(bf16));
                memset(out + there, 0, (COLUMNS - there) * sizeof(bf16));
            }
}

// Sums of a register of rows, one panel behind the other: from zero, or as they were kept.
template <int FIRST, int COUNT>
INLINE void start(float* kept, bool from_zero) {
    if constexpr (COUNT > 0) {
        if (from_zero) clear<FIRST>();
        else read<FIRST>(kept, BF16_PANELS * PANEL * sizeof(float));
        start<FIRST + 1, COUNT - 1>(kept + PANEL, from_zero);
    }
}
template <int FIRST, int COUNT>
INLINE void keep(float* kept) {
    if constexpr (COUNT > 0) {
        write<FIRST>(kept, BF16_PANELS * PANEL * sizeof(float));
        keep<FIRST + 1, COUNT - 1>(kept + PANEL);
    }
}

// The rows in one or two registers times the lines of each panel.
template <int ROWS, int PANELS, int P = 0>
INLINE void multiply(const bf16* w) {
    if constexpr (P < PANELS) {
        constexpr int WEIGHTS = WEIGHTS_AT + P % 2;
        read<WEIGHTS>(w + P * 2 * PANEL, STEP * sizeof(bf16));
        multiply_bf16<SUMS + P, ROWS_AT, WEIGHTS>();
        if constexpr (ROWS > 1) multiply_bf16<SUMS + PANELS + P, ROWS_AT + 1, WEIGHTS>();
        multiply<ROWS, PANELS, P + 1>(w);
    }
}

// How far ahead of its use memory is fetched that only these rows read.
constexpr int64_t AHEAD = 2 * PAGE;

template <bool ALONE, int ROWS, int PANELS>
void rows_of_panels(const Work& work, const Output& out) {
    static_assert(ROWS * PANELS <= 4, "registers for sums");
    constexpr int64_t NEXT = REGISTER_ROWS * BF16_PANELS * PANEL;  // from the sums of a register of rows to the next's
    start<SUMS, PANELS>(work.kept, work.starts());
    if constexpr (ROWS > 1) start<SUMS + PANELS, PANELS>(work.kept + NEXT, work.starts());
    const bf16 *w = work.w, *x = work.x + 2 * work.first * work.height;
    const char* ahead = ALONE ? (const char*)w + AHEAD : work.ahead;
    int64_t step = LINES * (ALONE ? STEP * (int64_t)sizeof(bf16) : work.step);
    for (int64_t i = 0; i < work.count; i += LINES, w += LINES * STEP, x += COLUMNS * work.height, ahead += step) {
        for (int64_t j = 0; j < step; j += CACHE_LINE) __builtin_prefetch(ahead + j, 0, SECOND_CACHE);
        read<ROWS_AT>(x, COLUMNS * sizeof(bf16));
        if constexpr (ROWS > 1) read<ROWS_AT + 1>(x + REGISTER_ROWS * work.columns, COLUMNS * sizeof(bf16));
        multiply<ROWS, PANELS>(w);
    }
    keep<SUMS, PANELS>(work.kept);
    if constexpr (ROWS > 1) keep<SUMS + PANELS, PANELS>(work.kept + NEXT);
    if (!work.ends()) return;
    for (int64_t r = 0; r < work.rows; r++)
        for (int p = 0; p < PANELS; p++)
            out.write(load(work.kept + (r * BF16_PANELS + p) * PANEL), work.row + r, work.column + p * PANEL);
}

}  // namespace
