// y = x W' + b for a bf16 weight that was packed once.
//
// A weight [n, k] is packed into panels of 16 outputs, of which BF16_PANELS lie line by line beside each other,
// [n/16/BF16_PANELS, k/2, BF16_PANELS, 16, 2]: a line holds two columns of 16 rows, and a weight is read from its first
// byte to its last. Missing rows, and columns up to a multiple of COLUMNS, are zeros. Every output is one chain of
// multiply-adds in float32 in the order of the columns, or with tile registers of sums over 32 of them, whichever rows,
// panels and threads share the work: its bits depend on its own row alone.
#include "kernels.h"
#include "layout.h"
#ifdef TILE_REGISTERS
#include "bf16_by_registers.h"
#else
#include "bf16_by_vectors.h"
#endif

namespace {

typedef void (*RowsOfPanels)(const Work&, const Output&);

template <int PANELS, int ROWS>
struct Tiles {
    static RowsOfPanels of(int64_t rows, bool alone) {
        if (rows < ROWS) return Tiles<PANELS, ROWS - 1>::of(rows, alone);
        return alone ? rows_of_panels<true, ROWS, PANELS> : rows_of_panels<false, ROWS, PANELS>;
    }
};
template <int PANELS>
struct Tiles<PANELS, 0> {
    static RowsOfPanels of(int64_t, bool) { return nullptr; }
};

// All rows times the BF16_PANELS panels that start at `w`, PANELS of them at a time; `kept` has room for their sums.
template <int PANELS, int MOST>
void panels_times_rows(const bf16* w, const bf16_operand* x, int64_t m, const Tiling& tiling, int64_t columns,
                       int64_t column, float* kept, const Output& out) {
    constexpr int64_t turns = BF16_PANELS / PANELS;
    int64_t lines = columns / 2, tiles = tiling.count * turns, chunk = tiles == 1 ? lines : CHUNK;
    int64_t bytes = chunk * STEP * sizeof(bf16);
    for (int64_t first = 0; first < lines; first += chunk) {
        const bf16* start = w + first * STEP;
        for (int64_t tile = 0; tile < tiles; tile++) {
            int64_t t = tile / turns, p = tile % turns * PANELS, row = tiling.start(t) * ROWS_TOGETHER;
            const char* ahead = (const char*)start + bytes + bytes * tile / tiles;
            Work work = {start + p * 2 * PANEL, x + row * columns, columns, first, least(chunk, lines - first),
                         ahead, STEP * (int64_t)sizeof(bf16) / tiles,
                         kept + (row * BF16_PANELS + p) * PANEL, row, column + p * PANEL,
                         least(tiling.height(t) * ROWS_TOGETHER, m - row), height_of(m)};
            Tiles<PANELS, MOST>::of(tiling.height(t), tiles == 1)(work, out);
        }
    }
}

}  // namespace

// Elements of the packed form of a weight [n, k].
EXPORT int64_t bf16_packed_size(int64_t n, int64_t k) {
    return round_up(n, PANEL * BF16_PANELS) * round_up(k, COLUMNS);
}

EXPORT void bf16_pack(const bf16* weight, int64_t n, int64_t k, bf16* packed, int threads) {
    int64_t panels = round_up(n, PANEL * BF16_PANELS) / PANEL, padded = round_up(k, COLUMNS);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        bf16* rows = allocate<bf16>(PANEL * padded);  // of a panel that is not whole
#pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; p++) {
            const bf16* source = weight + p * PANEL * k;
            if (padded > k || (p + 1) * PANEL > n) {
                memset(rows, 0, PANEL * padded * sizeof(bf16));
                for (int64_t r = 0; r < least(PANEL, n - p * PANEL); r++)
                    memcpy(rows + r * padded, source + r * k, k * sizeof(bf16));
                source = rows;
            }
            rows_to_lines((const uint32_t*)source, padded / 2, padded / 2, (uint32_t*)(packed + first_line(p, padded)),
                          BF16_PANELS);
        }
        free(rows);
    }
}

EXPORT void bf16_unpack(const bf16* packed, int64_t n, int64_t k, bf16* weight) {
    int64_t padded = round_up(k, COLUMNS);
    for (int64_t row = 0; row < n; row++)
        for (int64_t i = 0; i < k; i++)
            weight[row * k + i] = packed[first_line(row / PANEL, padded) + i / 2 * STEP + row % PANEL * 2 + i % 2];
}

// x [m, k] and y [m, n] contiguous; bias [n] or null.
EXPORT void bf16_linear(const bf16* x, int64_t m, int64_t k, int64_t n, const bf16* packed, const bf16* bias, bf16* y,
                        int threads) {
    if (m == 0) return;
    int64_t padded = round_up(k, COLUMNS), panels = round_up(n, PANEL) / PANEL;
    bool few = m <= FEW_ROWS;
    Tiling tiling(round_up(m, ROWS_TOGETHER) / ROWS_TOGETHER, few ? FEW.rows : MANY.rows);
    bool alone = tiling.count == 1;
    int64_t places = round_up(m, height_of(m));  // of rows
    bf16_operand* shared = alone ? nullptr : allocate<bf16_operand>(places * padded);
    Output out = {y, bias, n};
    if (m * n * k < 1 << 16) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        bf16_operand* operands = alone ? allocate<bf16_operand>(places * padded) : shared;
        if (alone) {  // every thread for itself: nobody waits
            lay_out(x, k, padded, m, height_of(m), operands);
        } else {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tiling.count; t++) {
                int64_t row = tiling.start(t) * ROWS_TOGETHER, count = least(tiling.height(t) * ROWS_TOGETHER, m - row);
                lay_out(x + row * k, k, padded, count, height_of(m), operands + row * padded);
            }
        }
        float* kept = allocate<float>(places * BF16_PANELS * PANEL);
        TileRegisters registers(height_of(m));
        auto run = few ? panels_times_rows<FEW.panels, FEW.rows> : panels_times_rows<MANY.panels, MANY.rows>;
#pragma omp for schedule(guided)  // who is slowed down by others does less, and still reads long stretches
        for (int64_t p = 0; p < panels; p += BF16_PANELS)
            run(packed + first_line(p, padded), operands, m, tiling, padded, p * PANEL, kept, out);
        free(kept);
        if (alone) free(operands);
    }
    free(shared);
}
