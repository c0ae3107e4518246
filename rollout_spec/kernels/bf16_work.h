// What a tile of rows has to do for a bf16 product (see bf16_linear.cpp), by vectors or by registers.
#pragma once
#include "tile.h"

namespace {

// Elements from a line of a panel to its next.
constexpr int64_t STEP = 2 * PANEL * BF16_PANELS;

// Lines that several tiles go through before any goes on: they find them in a cache, where the tiles before them have
// fetched them, each its share.
constexpr int64_t CHUNK = BF16_CHUNK / sizeof(bf16) / STEP;

// Where a panel begins in the packed form of a weight with so many columns.
int64_t first_line(int64_t panel, int64_t columns) {
    return panel / BF16_PANELS * BF16_PANELS * PANEL * columns + panel % BF16_PANELS * 2 * PANEL;
}

struct Output {
    bf16* y;
    const bf16* bias;
    int64_t n;

    // The columns of a panel that are there; of one that only fills a group none is.
    void write(F16 sum, int64_t row, int64_t column) const {
        float values[PANEL];
        store(values, sum);
        bf16* own = y + row * n + column;
        if (bias)
            for (int64_t i = 0; i < least(PANEL, n - column); i++) values[i] += widen(bias[column + i]);
        if (n - column >= PANEL) narrow_panel(values, own);
        else
            for (int64_t i = 0; i < n - column; i++) own[i] = narrow(values[i]);
    }
};

// What a tile does with a chunk of some panels.
struct Work {
    const bf16* w;                  // the chunk's first line
    const bf16_operand* x;          // the tile's rows, from their first column on
    int64_t columns, first, count;  // columns of the weight; lines before the chunk, and in it
    const char* ahead;              // see lines_of_several
    int64_t step;
    float* kept;                    // sums between chunks, [rows, BF16_PANELS, 16], from the tile's own on
    int64_t row, column;            // of the output
    int64_t rows, height;           // for registers: rows that are there, and lines of a register

    bool starts() const { return first == 0; }
    bool ends() const { return 2 * (first + count) == columns; }
};

}  // namespace
