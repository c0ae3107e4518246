// y = x W' + b for a bf16 weight that was packed once.
//
// A weight [n, k] is packed into panels of 16 outputs, of which BF16_PANELS lie line by line beside each other,
// [n/16/BF16_PANELS, k/2, BF16_PANELS, 16, 2]: a line holds two columns of 16 rows, and a weight is read from its first
// byte to its last. Missing rows and columns are zeros. Every output is one chain of multiply-adds in float32 in the
// order of the columns, whichever rows, panels and threads share the work: its bits depend on its own row alone. (With
// tile registers it is a chain of the sums over 32 columns.)
#include "kernels.h"
#include "layout.h"
#include "tile.h"
#include "tile_registers.h"

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
    int64_t rows, height;           // rows that are there; lines of a register

    bool starts() const { return first == 0; }
    bool ends() const { return 2 * (first + count) == columns; }
};

#ifdef TILE_REGISTERS

// Rows that go together, and the multiple of columns that their products need.
constexpr int64_t ROWS_TOGETHER = REGISTER_ROWS, COLUMNS = 32;
constexpr int64_t LINES = COLUMNS / 2;  // of a panel, in a register

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

#else

struct TileRegisters {
    explicit TileRegisters(int64_t) {}
};

constexpr int64_t ROWS_TOGETHER = 1, COLUMNS = 2;
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

#endif

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
EXPORT int64_t bf16_packed_size(int64_t n, int64_t k) { return round_up(n, PANEL * BF16_PANELS) * round_up(k, COLUMNS); }

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
    bool few = m <= BF16_FEW_ROWS;
    Tiling tiling(round_up(m, ROWS_TOGETHER) / ROWS_TOGETHER, few ? BF16_FEW.rows : BF16_MANY.rows);
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
        auto run = few ? panels_times_rows<BF16_FEW.panels, BF16_FEW.rows>
                       : panels_times_rows<BF16_MANY.panels, BF16_MANY.rows>;
#pragma omp for schedule(guided)  // who is slowed down by others does less, and still reads long stretches
        for (int64_t p = 0; p < panels; p += BF16_PANELS)
            run(packed + first_line(p, padded), operands, m, tiling, padded, p * PANEL, kept, out);
        free(kept);
        if (alone) free(operands);
    }
    free(shared);
}
