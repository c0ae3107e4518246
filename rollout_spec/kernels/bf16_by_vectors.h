// Rows of a bf16 product by vectors: up to as many as find room for their sums in the processor's registers.
#pragma once
#include "bf16_work.h"
#include "tile_registers.h"

namespace {

constexpr int64_t ROWS_TOGETHER = 1, COLUMNS = 2, FEW_ROWS = BF16_FEW_ROWS;
constexpr Tile FEW = BF16_FEW, MANY = BF16_MANY;
int64_t height_of(int64_t) { return 1; }

void lay_out(const bf16* x, int64_t k, int64_t padded, int64_t count, int64_t, bf16_operand* out) {
    interleave(x, k, padded, count, out);
}

// A tile that is alone waits for memory, which the processor fetches by itself, up to the end of a page: of the next
// one it needs the beginning.
constexpr int64_t LINES_OF_PAGE = PAGE / sizeof(bf16) / STEP, BEGINNING = LINES_OF_PAGE / 4;

template <int ROWS, int PANELS>
INLINE void lines_alone(const bf16* w, const bf16_operand* x, int64_t count, F16 (&sums)[ROWS][PANELS]) {
    for (int64_t i = 0; i < count;) {
        for (int64_t stop = least(i + BEGINNING, count); i < stop; i++, w += STEP, x += 2 * ROWS) {
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; p++)
                __builtin_prefetch((const char*)(w + p * 2 * PANEL) + PAGE, 0, SECOND_CACHE);
            line(w, x, sums);
        }
        for (int64_t stop = least(i + LINES_OF_PAGE - BEGINNING, count); i < stop; i++, w += STEP, x += 2 * ROWS)
            line(w, x, sums);
    }
}

// `ahead` is fetched on the way, `step` bytes for every line of a panel.
template <int ROWS, int PANELS>
INLINE void lines_of_several(const bf16* w, const bf16_operand* x, int64_t count, const char* ahead, int64_t step,
                             F16 (&sums)[ROWS][PANELS]) {
    for (int64_t i = 0; i < count; i++, w += STEP, x += 2 * ROWS, ahead += step) {
#pragma GCC unroll 2
        for (int j = 0; j < BF16_PANELS / 2; j++) __builtin_prefetch(ahead + j * CACHE_LINE, 0, SECOND_CACHE);
        line(w, x, sums);
    }
}

template <bool ALONE, int ROWS, int PANELS>
void rows_of_panels(const Work& work, const Output& out) {
    F16 sums[ROWS][PANELS];
    float* kept = work.kept;
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PANELS; p++)
            sums[r][p] = work.starts() ? zeros() : load(kept + (r * BF16_PANELS + p) * PANEL);
    const bf16_operand* x = work.x + 2 * work.first * ROWS;
    if (ALONE) lines_alone(work.w, x, work.count, sums);
    else lines_of_several(work.w, x, work.count, work.ahead, work.step, sums);
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PANELS; p++) {
            if (!work.ends()) store(kept + (r * BF16_PANELS + p) * PANEL, sums[r][p]);
            else out.write(sums[r][p], work.row + r, work.column + p * PANEL);
        }
}

}  // namespace
