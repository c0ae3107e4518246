// y = x W' for quantized weights and activations that are quantized to 8 bits, row by row, on the way in.
//
// Sums of products are integers, hence exact; what is left in floating point is one chain of multiply-adds over the
// groups in their order. An output's bits depend on its own row alone.
//
// Layout of a weight [n, k], by panels of 16 rows, rows and columns padded to multiples of 16 and 64 with zeros:
//   int8  [n/16, k/4, 16, 4] signed bytes; a float32 scale per row
//   4 bits [n/16, k/64, block]; a block holds 8 lines of 16 x 4 bytes, whose low and high nibbles are the codes of
//         columns 8 t .. 8 t + 3 and 8 t + 4 .. 8 t + 7 of line t, then 16 bf16 scales, then, for int4, 16 bf16 offsets
//   int4: weight = code * scale + offset.    nf4: weight = (NF4[code] - 32) * scale, NF4 from 0 to 64.
#include "kernels.h"
#include "layout.h"
#include "nf4.h"
#include "tile_registers.h"

#include <optional>
#include <type_traits>

namespace {

constexpr int64_t LINES = GROUP / 8;
constexpr int64_t CODES = LINES * 64;  // bytes of a block's codes

constexpr int FEW_ROWS = 2;

// Fetch what lies ahead of `w`. The processor fetches memory by itself, which is all that few rows wait for, but up to
// the end of a page: of the next one it needs the beginning.
template <bool FEW>
INLINE void fetch(const uint8_t* w) {
    if (!FEW) __builtin_prefetch(w + 3072);
    if ((uintptr_t)w % PAGE < PAGE / 4) __builtin_prefetch(w + PAGE, 0, SECOND_CACHE);
}

INLINE void widen_bytes(const int8_t* x, int64_t count, int16_t* out) {
    for (int64_t i = 0; i < count; i++) out[i] = x[i];
}
INLINE void widen_bytes(const int8_t* x, int64_t count, int8_t* out) { memcpy(out, x, count); }

// Rows of x as 8-bit integers times a scale per row, with the sums of every group of 64, each times SUM_FACTOR. Values
// are laid out as registers read them, [rows / height, groups, height, 64]; with a height of 1 that is row by row.
template <typename Kind>
struct Activations {
    typedef typename Kind::Operand Operand;
    typedef typename Kind::Sum Sum;
    Operand* values;
    Sum* sums;
    float* scales;
    int64_t rows, columns, groups, height;

    Activations(int64_t rows, int64_t columns, int64_t height)
        : rows(rows), columns(columns), groups(columns / GROUP), height(height) {
        int64_t places = round_up(rows, height);
        values = allocate<Operand>(places * columns);
        sums = allocate<Sum>(places * groups);
        scales = allocate<float>(rows);
        for (int64_t row = rows; row < places; row++)
            for (int64_t g = 0; g < groups; g++) {
                memset(first_group(row) + g * height * GROUP, 0, GROUP * sizeof(Operand));
                sums[row * groups + g] = 0;
            }
    }
    ~Activations() { free(values), free(sums), free(scales); }

    // A row's first group; the next is height * GROUP further on.
    Operand* first_group(int64_t row) const {
        return values + (row / height * groups * height + row % height) * GROUP;
    }

    template <typename Float>
    void quantize(const Float* x, int64_t row, int64_t k) const {
        int32_t largest = bits_of(1e-30f);  // as integers, so that NaN is largest
        for (int64_t i = 0; i < k; i++) {
            int32_t bits = bits_of(widen(x[i])) & 0x7fffffff;
            largest = bits > largest ? bits : largest;
        }
        bool finite = largest < 0x7f800000;
        float limit = float_of(largest);
        scales[row] = finite ? limit / 127 : float_of(0x7fc00000);
        Operand* own = first_group(row);
        for (int64_t g = 0, next = height * GROUP; g < groups; g++, own += next) {
            alignas(32) float part[GROUP] = {};
            alignas(32) int8_t bytes[GROUP] = {};
            int64_t count = least(GROUP, k - g * GROUP);
            for (int64_t i = 0; i < count; i++) part[i] = widen(x[g * GROUP + i]);
            if (finite) round_to_bytes(part, GROUP, 0, 127 / limit, -127, 127, bytes);
            int32_t sum = 0;
            for (int64_t i = 0; i < GROUP; i++) sum += bytes[i];
            sums[row * groups + g] = Kind::SUM_FACTOR * sum;
            widen_bytes(bytes, GROUP, own);
        }
    }
};

template <typename Float>
struct Output {
    Float* y;
    int64_t n;

    void write(F16 sum, int64_t row, int64_t column) const {
        float values[PANEL];
        store(values, sum);
        Float* own = y + row * n + column;
        if (n - column >= PANEL) put_panel(values, own);
        else
            for (int64_t i = 0; i < n - column; i++) put(values[i], own + i);
    }

    static void put_panel(const float* values, float* out) { memcpy(out, values, PANEL * 4); }
    static void put_panel(const float* values, bf16* out) { narrow_panel(values, out); }
    static void put(float value, float* out) { *out = value; }
    static void put(float value, bf16* out) { *out = narrow(value); }
};

struct Int8 {
    typedef int8_operand Operand;
    typedef int32_t Sum;
    static constexpr int ROWS = INT8_ROWS, SUM_FACTOR = 1;
    static constexpr bool SPREADS = false;
    static int64_t panel_bytes(int64_t columns) { return columns * PANEL; }

    template <int R, bool FEW>
    static void sums(const uint8_t* w, const float* scales, const Activations<Int8>& x, int64_t row, F16 (&out)[R]) {
        const Operand* values = x.values + row * x.columns;
        ByteSums sums[R];
        for (int r = 0; r < R; r++) sums[r] = byte_zeros();
        for (int64_t i = 0; i < x.columns; i += 4) {
            fetch<FEW>(w + i * PANEL);
            Bytes line = load_bytes((const int8_t*)w + i * PANEL);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) sums[r] = dot(sums[r], line, values + r * x.columns + i);
        }
        F16 scale = load(scales);
        for (int r = 0; r < R; r++) {
            int32_t sum = 0;
            for (int64_t g = 0; g < x.groups; g++) sum += x.sums[(row + r) * x.groups + g];
            out[r] = fma(scaled(to_float(total(sums[r], sum)), x.scales[row + r]), scale, zeros());
        }
    }

#ifdef TILE_REGISTERS
    static constexpr int64_t MOST = 4;  // registers of rows that share the reading of weights

    template <typename Float>
    static void panel_in_registers(const uint8_t* w, const float* scales, const Activations<Int8>& x, int8_t*,
                                   int64_t column, const Output<Float>& out) {
        for (int64_t row = 0; row < x.rows; row += MOST * REGISTER_ROWS) {
            int64_t registers = least((x.rows - row + REGISTER_ROWS - 1) / REGISTER_ROWS, MOST);
            if (registers == 1) rows_in_registers<1>(w, scales, x, row, column, out);
            if (registers == 2) rows_in_registers<2>(w, scales, x, row, column, out);
            if (registers == 3) rows_in_registers<3>(w, scales, x, row, column, out);
            if (registers == 4) rows_in_registers<4>(w, scales, x, row, column, out);
        }
    }

    template <int COUNT, typename Float>
    static void rows_in_registers(const uint8_t* w, const float* scales, const Activations<Int8>& x, int64_t row,
                                  int64_t column, const Output<Float>& out) {
        alignas(CACHE_LINE) int32_t sums[COUNT * REGISTER_ROWS][PANEL];
        const int8_t* rows = x.first_group(row);
        clear_sums<COUNT>();
        for (int64_t g = 0; g < x.groups; g++, w += GROUP * PANEL, rows += REGISTER_ROWS * GROUP) {
            __builtin_prefetch(w + PAGE);
            read<WEIGHTS_AT>(w, CACHE_LINE);
            multiply_rows<COUNT>(rows, REGISTER_ROWS * x.columns);
        }
        write_sums<COUNT>(sums);
        F16 scale = load(scales);
        for (int64_t r = 0; r < least(COUNT * REGISTER_ROWS, x.rows - row); r++) {
            F16 sum = scaled(to_float(load_line(sums[r])), x.scales[row + r]);
            out.write(fma(sum, scale, zeros()), row + r, column);
        }
    }

    template <int COUNT>
    static void clear_sums() {
        if constexpr (COUNT > 0) clear<SUMS + COUNT - 1>(), clear_sums<COUNT - 1>();
    }
    template <int COUNT>
    static void write_sums(int32_t (*sums)[PANEL]) {
        if constexpr (COUNT > 0) {
            write<SUMS + COUNT - 1>(sums + (COUNT - 1) * REGISTER_ROWS, CACHE_LINE);
            write_sums<COUNT - 1>(sums);
        }
    }
    // A group of the rows of COUNT registers, which lie `next` bytes apart, times the weights that have been read.
    template <int COUNT>
    static void multiply_rows(const int8_t* rows, int64_t next) {
        if constexpr (COUNT > 0) {
            constexpr int ROWS = ROWS_AT + COUNT % 2;
            read<ROWS>(rows + (COUNT - 1) * next, GROUP);
            multiply_int8<SUMS + COUNT - 1, ROWS, WEIGHTS_AT>();
            multiply_rows<COUNT - 1>(rows, next);
        }
    }
#endif
};

template <bool NF4_CODES>
struct FourBits {
    typedef int8_t Operand;
    typedef std::conditional_t<NF4_CODES, int32_t, float> Sum;
    static constexpr int ROWS = INT4_ROWS, SUM_FACTOR = NF4_CODES ? -32 : 1;
    static constexpr bool SPREADS = true;  // codes to bytes, for registers
    static constexpr int64_t BLOCK = CODES + (NF4_CODES ? 32 : 64);
    static int64_t panel_bytes(int64_t columns) { return columns / GROUP * BLOCK; }

    template <int R, bool FEW>
    static void sums(const uint8_t* w, const float*, const Activations<FourBits>& x, int64_t row, F16 (&out)[R]) {
        const Table table = load_table(NF4);
        const Operand* values = x.values + row * x.columns;
        const Sum* group_sums = x.sums + row * x.groups;
        for (int r = 0; r < R; r++) out[r] = zeros();
        for (int64_t g = 0; g < x.groups; g++, w += BLOCK, values += GROUP) {
            NibbleSums sums[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) sums[r] = nibble_start(NF4_CODES ? group_sums[r * x.groups + g] : 0);
#pragma GCC unroll 2
            for (int half = 0; half < LINES; half += 4) {
#pragma GCC unroll 4
                for (int t = half; t < half + 4; t++) {
                    fetch<FEW>(w + t * 64);
                    Nibbles line = load_nibbles<NF4_CODES>(w + t * 64, table);
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) sums[r] = dot<NF4_CODES>(sums[r], line, values + r * x.columns + t * 8);
                }
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) sums[r] = after_four_lines<NF4_CODES>(sums[r]);
            }
            F16 scale = load((const bf16*)(w + CODES));
            if (NF4_CODES) {
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) out[r] = fma(to_float(total(sums[r])), scale, out[r]);
            } else {
                F16 offset = load((const bf16*)(w + CODES) + PANEL);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    out[r] = fma(to_float(total(sums[r])), scale, out[r]);
                    out[r] = fma(offset, (float)group_sums[r * x.groups + g], out[r]);
                }
            }
        }
        for (int r = 0; r < R; r++) out[r] = scaled(out[r], x.scales[row + r]);
    }

#ifdef TILE_REGISTERS
    // `bytes` has room for the panel's codes as bytes, in the order of the columns.
    template <typename Float>
    static void panel_in_registers(const uint8_t* w, const float*, const Activations<FourBits>& x, int8_t* bytes,
                                   int64_t column, const Output<Float>& out) {
        const Table table = load_table(NF4);
        I16* lines = (I16*)bytes;
        for (int64_t g = 0; g < x.groups; g++)
            for (int t = 0; t < LINES; t++) {
                const uint8_t* codes = w + g * BLOCK + t * CACHE_LINE;
                __builtin_prefetch(codes + PAGE);
                Nibbles line = load_nibbles<NF4_CODES>(codes, table);
                *lines++ = line.low, *lines++ = line.high;
            }
        for (int64_t row = 0; row < x.rows; row += REGISTER_ROWS) {
            F16 sums[REGISTER_ROWS];
            rows_in_register(w + CODES, x, bytes, row, sums);
            for (int64_t r = 0; r < least(REGISTER_ROWS, x.rows - row); r++)
                out.write(scaled(sums[r], x.scales[row + r]), row + r, column);
        }
    }

    static void rows_in_register(const uint8_t* scales, const Activations<FourBits>& x, const int8_t* bytes,
                                 int64_t row, F16 (&out)[REGISTER_ROWS]) {
        const Sum* group_sums = x.sums + row * x.groups;
        F16 sums[REGISTER_ROWS];
#pragma GCC unroll 16
        for (int r = 0; r < REGISTER_ROWS; r++) sums[r] = zeros();
        const int8_t* rows = x.first_group(row);
        for (int64_t g = 0; g < x.groups; g++, bytes += GROUP * PANEL, scales += BLOCK, group_sums++) {
            alignas(CACHE_LINE) int32_t products[REGISTER_ROWS][PANEL];
            clear<SUMS>();
            read<ROWS_AT>(rows + g * REGISTER_ROWS * GROUP, GROUP);
            read<WEIGHTS_AT>(bytes, CACHE_LINE);
            multiply_int8<SUMS, ROWS_AT, WEIGHTS_AT>();
            write<SUMS>(products, CACHE_LINE);
            F16 scale = load((const bf16*)scales), offset = load((const bf16*)scales + (NF4_CODES ? 0 : PANEL));
#pragma GCC unroll 16
            for (int r = 0; r < REGISTER_ROWS; r++) {
                Sum of_x = group_sums[r * x.groups];
                I16 product = load_line(products[r]);
                if (NF4_CODES) product = plus(product, (int32_t)of_x);
                sums[r] = fma(to_float(product), scale, sums[r]);
                if (!NF4_CODES) sums[r] = fma(offset, (float)of_x, sums[r]);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < REGISTER_ROWS; r++) out[r] = sums[r];
    }
#endif
};

template <typename Kind, typename Float, int R>
void rows_of_panel(const uint8_t* w, const float* scales, const Activations<Kind>& x, int64_t row,
                   int64_t column, const Output<Float>& out) {
    F16 sums[R];
    if (R <= FEW_ROWS && x.rows == R) Kind::template sums<R, (R <= FEW_ROWS)>(w, scales, x, row, sums);
    else Kind::template sums<R, false>(w, scales, x, row, sums);
    for (int r = 0; r < R; r++) out.write(sums[r], row + r, column);
}

template <typename Kind, typename Float, int R>
struct Tiles {
    static void run(int64_t rows, const uint8_t* w, const float* scales, const Activations<Kind>& x,
                    int64_t row, int64_t column, const Output<Float>& out) {
        if (rows == R) rows_of_panel<Kind, Float, R>(w, scales, x, row, column, out);
        else Tiles<Kind, Float, R - 1>::run(rows, w, scales, x, row, column, out);
    }
};
template <typename Kind, typename Float>
struct Tiles<Kind, Float, 0> {
    static void run(int64_t, const uint8_t*, const float*, const Activations<Kind>&, int64_t, int64_t,
                    const Output<Float>&) {}
};

// All rows, a tile at a time.
template <typename Kind, typename Float>
void panel_by_vectors(const uint8_t* w, const float* scales, const Activations<Kind>& x,
                      int64_t column, const Output<Float>& out) {
    int64_t tiles = (x.rows + Kind::ROWS - 1) / Kind::ROWS;
    for (int64_t row = 0; tiles; tiles--) {
        int64_t height = (x.rows - row + tiles - 1) / tiles;
        Tiles<Kind, Float, Kind::ROWS>::run(height, w, scales, x, row, column, out);
        row += height;
    }
}

#ifdef TILE_REGISTERS

constexpr int64_t MOST_BY_VECTORS = 8;

// How many rows lie together: those of a register, or of few rows each by itself, for vectors. The bits are the same.
int64_t height_of(int64_t m) { return m <= MOST_BY_VECTORS ? 1 : REGISTER_ROWS; }

template <typename Kind, typename Float>
void panel(const uint8_t* w, const float* scales, const Activations<Kind>& x, int8_t* bytes, int64_t column,
           const Output<Float>& out) {
    if (x.height > 1) Kind::panel_in_registers(w, scales, x, bytes, column, out);
    else panel_by_vectors(w, scales, x, column, out);
}

#else

int64_t height_of(int64_t) { return 1; }

template <typename Kind, typename Float>
void panel(const uint8_t* w, const float* scales, const Activations<Kind>& x, int8_t*, int64_t column,
           const Output<Float>& out) {
    panel_by_vectors(w, scales, x, column, out);
}

#endif

template <typename Kind, typename Float>
void linear(const Float* x, int64_t m, int64_t k, int64_t n, const uint8_t* packed, const float* scales, Float* y,
            int threads) {
    int64_t columns = round_up(k, GROUP), panels = round_up(n, PANEL) / PANEL, height = height_of(m);
    Activations<Kind> rows(m, columns, height);
    Output<Float> out = {y, n};
    if (m * n * k < 1 << 17) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < m; row++) rows.quantize(x + row * k, row, k);
        int8_t* bytes = height > 1 && Kind::SPREADS ? allocate<int8_t>(columns * PANEL) : nullptr;
        std::optional<TileRegisters> registers;
        if (height > 1) registers.emplace(height);
#pragma omp for schedule(guided)  // see bf16_linear.cpp
        for (int64_t p = 0; p < panels; p++) {
            const float* own = scales ? scales + p * PANEL : nullptr;
            panel(packed + p * Kind::panel_bytes(columns), own, rows, bytes, p * PANEL, out);
        }
        free(bytes);
    }
}

}  // namespace

// x [m, k] and y [m, n] contiguous, both float32 or (is_bf16) bf16; the kinds' numbers are those of quantize.cpp.
EXPORT void quantized_linear(int kind, int is_bf16, const void* x, int64_t m, int64_t k, int64_t n,
                             const uint8_t* packed, const float* scales, void* y, int threads) {
    auto run = [&](auto* input, auto* output) {
        if (kind == INT8) linear<Int8>(input, m, k, n, packed, scales, output, threads);
        if (kind == INT4) linear<FourBits<false>>(input, m, k, n, packed, scales, output, threads);
        if (kind == NF4_KIND) linear<FourBits<true>>(input, m, k, n, packed, scales, output, threads);
    };
    if (is_bf16) run((const bf16*)x, (bf16*)y);
    else run((const float*)x, (float*)y);
}
