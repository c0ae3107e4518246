// y = x W' + b for a bf16 weight that was packed once.
//
// A weight [n, k] is packed into panels of 16 outputs, [n/16, k/2, 16, 2]: one line of a panel holds two columns of
// 16 rows. Missing rows and columns are zeros. Every output is one chain of multiply-adds in float32 in the order
// of the columns, whichever rows, panels and threads share the work: its bits depend on its own row alone.
#include "kernels.h"
#include "layout.h"

namespace {

// The rows of x in tiles of nearly equal height, at most `most`.
struct Tiling {
    int64_t rows, count;
    Tiling(int64_t rows, int64_t most) : rows(rows), count((rows + most - 1) / most) {}
    int64_t start(int64_t tile) const { return tile * (rows / count) + least(tile, rows % count); }
    int64_t height(int64_t tile) const { return rows / count + (tile < rows % count); }
};

constexpr int64_t LINE = 2 * PANEL * sizeof(bf16);  // bytes

// What one step of a dot product reads of a row: one column, or a pair of them.
constexpr int64_t UNIT = 2 / LINE_PARTS;

// Rows of a tile as the dot products read them, [k / UNIT, height, UNIT]; a zero follows an odd number of columns.
[[maybe_unused]] void interleave(const bf16* x, int64_t k, int64_t padded, int64_t height, float* out) {
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

// What to fetch while a panel is multiplied: from where, and how many bytes per line of the panel.
struct Ahead {
    const char* start;
    int64_t step;
};

template <int ROWS, int PANELS>
INLINE void tile(const bf16* w, int64_t panel, const bf16_operand* x, int64_t k, Ahead ahead,
                 F16 (&sums)[ROWS][PANELS]) {
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PANELS; p++) sums[r][p] = zeros();
    for (int64_t i = 0; i < k; i += 2, w += 2 * PANEL, x += 2 * ROWS, ahead.start += ahead.step) {
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++) {
            const bf16* line = w + p * panel;
            __builtin_prefetch(ahead.start + p * panel * sizeof(bf16), 0, 4 - fetch(PANELS).cache);
#pragma GCC unroll 2
            for (int part = 0; part < LINE_PARTS; part++) {
                LinePart weights = load_part(line, part);
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; r++) sums[r][p] = dot(sums[r][p], weights, x + (part * ROWS + r) * UNIT);
            }
        }
    }
}

struct Output {
    bf16* y;
    const bf16* bias;
    int64_t n;

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

template <int ROWS, int PANELS>
void rows_of_panels(const bf16* w, int64_t panel, const bf16_operand* x, int64_t k, Ahead ahead, int64_t row,
                    int64_t column, const Output& out) {
    F16 sums[ROWS][PANELS];
    tile<ROWS, PANELS>(w, panel, x + row * k, k, ahead, sums);
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PANELS; p++) out.write(sums[r][p], row + r, column + p * PANEL);
}

typedef void (*RowsOfPanels)(const bf16*, int64_t, const bf16_operand*, int64_t, Ahead, int64_t, int64_t,
                             const Output&);

template <int PANELS, int ROWS>
struct Tiles {
    static RowsOfPanels of(int64_t rows) {
        return rows == ROWS ? rows_of_panels<ROWS, PANELS> : Tiles<PANELS, ROWS - 1>::of(rows);
    }
};
template <int PANELS>
struct Tiles<PANELS, 0> {
    static RowsOfPanels of(int64_t) { return nullptr; }
};

// All rows of one, two or four panels. A single tile fetches its own panels, some KiB ahead. Of several the first would
// wait for memory and the others, which find the panels in the cache, leave it idle: each fetches its share of the next.
template <int PANELS, int MOST>
void panels_times_rows(const bf16* w, int64_t panel, const bf16_operand* x, const Tiling& tiling, int64_t k,
                       int64_t column, const Output& out) {
    int64_t count = tiling.count, bytes = panel * sizeof(bf16);
    for (int64_t t = 0; t < count; t++) {
        int64_t further = count > 1 ? PANELS * bytes + bytes * t / count : fetch(PANELS).ahead;
        Ahead ahead = {(const char*)w + further, LINE / count};
        Tiles<PANELS, MOST>::of(tiling.height(t))(w, panel, x, k, ahead, tiling.start(t), column, out);
    }
}

}  // namespace

// Elements of the packed form of a weight [n, k].
EXPORT int64_t bf16_packed_size(int64_t n, int64_t k) { return round_up(n, PANEL) * round_up(k, 2); }

EXPORT void bf16_pack(const bf16* weight, int64_t n, int64_t k, bf16* packed, int threads) {
    int64_t panels = round_up(n, PANEL) / PANEL, padded = round_up(k, 2);
    prefer_large_pages(packed, bf16_packed_size(n, k) * sizeof(bf16));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        bf16* rows = allocate<bf16>(PANEL * padded);  // of a panel that is not whole
#pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; p++) {
            const bf16* source = weight + p * PANEL * k;
            if (k % 2 || (p + 1) * PANEL > n) {
                memset(rows, 0, PANEL * padded * sizeof(bf16));
                for (int64_t r = 0; r < least(PANEL, n - p * PANEL); r++)
                    memcpy(rows + r * padded, source + r * k, k * sizeof(bf16));
                source = rows;
            }
            rows_to_lines((const uint32_t*)source, padded / 2, padded / 2, (uint32_t*)(packed + p * PANEL * padded));
        }
        free(rows);
    }
}

EXPORT void bf16_unpack(const bf16* packed, int64_t n, int64_t k, bf16* weight) {
    int64_t padded = round_up(k, 2);
    for (int64_t row = 0; row < n; row++)
        for (int64_t i = 0; i < k; i++)
            weight[row * k + i] = packed[(row / PANEL * padded + i / 2 * 2) * PANEL + row % PANEL * 2 + i % 2];
}

// x [m, k] and y [m, n] contiguous; bias [n] or null.
EXPORT void bf16_linear(const bf16* x, int64_t m, int64_t k, int64_t n, const bf16* packed, const bf16* bias, bf16* y,
                        int threads) {
    int64_t padded = round_up(k, 2), panel = PANEL * padded, panels = round_up(n, PANEL) / PANEL;
    // few rows: several panels at a time, to have enough sums, and enough of the weights, under way
    bool by_fours = m <= BF16_ROWS_OF_FOUR, by_pairs = m <= BF16_FEW_ROWS;
    int64_t group = by_fours ? 4 : 2;  // those left over are multiplied two or one at a time, by the same tiles:
    static_assert(BF16_ROWS_OF_FOUR <= BF16_ROWS_OF_PAIR && BF16_ROWS_OF_PAIR <= BF16_ROWS);
    Tiling tiling(m, by_pairs ? BF16_ROWS_OF_PAIR : BF16_ROWS);
    bf16_operand* operands = allocate<bf16_operand>(m * padded);
    Output out = {y, bias, n};
    if (m * n * k < 1 << 16) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tiling.count; t++) {
            int64_t row = tiling.start(t);
            interleave(x + row * k, k, padded, tiling.height(t), operands + row * padded);
        }
#pragma omp for schedule(static)
        for (int64_t first = 0; first < panels; first += group) {
            for (int64_t p = first, end = least(first + group, panels), next; p < end; p = next) {
                const bf16* w = packed + p * panel;
                next = p + (by_fours && end - p == 4 ? 4 : by_pairs && end - p >= 2 ? 2 : 1);
                auto run = next - p == 4   ? panels_times_rows<4, BF16_ROWS_OF_FOUR>
                           : next - p == 2 ? panels_times_rows<2, BF16_ROWS_OF_PAIR>
                                           : panels_times_rows<1, BF16_ROWS>;
                run(w, panel, operands, tiling, padded, p * PANEL, out);
            }
        }
    }
    free(operands);
}
