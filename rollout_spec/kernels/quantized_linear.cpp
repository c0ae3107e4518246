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

// Rows of x as 8-bit integers times a scale per row, with the sums of every group of 64, each times `factor`.
template <typename Operand>
struct Activations {
    Operand* values;
    int32_t* sums;
    float* scales;
    int64_t rows, columns, groups;
    int32_t factor;

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
        for (int64_t g = 0; g < groups; g++) {
            alignas(32) float part[GROUP] = {};
            alignas(32) int8_t bytes[GROUP] = {};
            int64_t count = least(GROUP, k - g * GROUP);
            for (int64_t i = 0; i < count; i++) part[i] = widen(x[g * GROUP + i]);
            if (finite) round_to_bytes(part, GROUP, 0, 127 / limit, -127, 127, bytes);
            int32_t sum = 0;
            for (int64_t i = 0; i < GROUP; i++) sum += bytes[i];
            sums[row * groups + g] = factor * sum;
            widen_bytes(bytes, GROUP, values + row * columns + g * GROUP);
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
    static constexpr int ROWS = INT8_ROWS, SUM_FACTOR = 1;
    static int64_t panel_bytes(int64_t columns) { return columns * PANEL; }

    template <int R, bool FEW>
    static void sums(const uint8_t* w, const float* scales, const Activations<Operand>& x, int64_t row, F16 (&out)[R]) {
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
};

template <bool NF4_CODES>
struct FourBits {
    typedef int8_t Operand;
    static constexpr int ROWS = INT4_ROWS, SUM_FACTOR = NF4_CODES ? -32 : 1;
    static constexpr int64_t BLOCK = CODES + (NF4_CODES ? 32 : 64);
    static int64_t panel_bytes(int64_t columns) { return columns / GROUP * BLOCK; }

    template <int R, bool FEW>
    static void sums(const uint8_t* w, const float*, const Activations<Operand>& x, int64_t row, F16 (&out)[R]) {
        const Table table = load_table(NF4);
        const Operand* values = x.values + row * x.columns;
        const int32_t* group_sums = x.sums + row * x.groups;
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
};

template <typename Kind, typename Float, int R>
void rows_of_panel(const uint8_t* w, const float* scales, const Activations<typename Kind::Operand>& x, int64_t row,
                   int64_t column, const Output<Float>& out) {
    F16 sums[R];
    if (R <= FEW_ROWS && x.rows == R) Kind::template sums<R, (R <= FEW_ROWS)>(w, scales, x, row, sums);
    else Kind::template sums<R, false>(w, scales, x, row, sums);
    for (int r = 0; r < R; r++) out.write(sums[r], row + r, column);
}

template <typename Kind, typename Float, int R>
struct Tiles {
    static void run(int64_t rows, const uint8_t* w, const float* scales, const Activations<typename Kind::Operand>& x,
                    int64_t row, int64_t column, const Output<Float>& out) {
        if (rows == R) rows_of_panel<Kind, Float, R>(w, scales, x, row, column, out);
        else Tiles<Kind, Float, R - 1>::run(rows, w, scales, x, row, column, out);
    }
};
template <typename Kind, typename Float>
struct Tiles<Kind, Float, 0> {
    static void run(int64_t, const uint8_t*, const float*, const Activations<typename Kind::Operand>&, int64_t, int64_t,
                    const Output<Float>&) {}
};

template <typename Kind, typename Float>
void linear(const Float* x, int64_t m, int64_t k, int64_t n, const uint8_t* packed, const float* scales, Float* y,
            int threads) {
    typedef typename Kind::Operand Operand;
    int64_t columns = round_up(k, GROUP), groups = columns / GROUP, panels = round_up(n, PANEL) / PANEL;
    Activations<Operand> rows = {allocate<Operand>(m * columns), allocate<int32_t>(m * groups), allocate<float>(m),
                                 m, columns, groups, Kind::SUM_FACTOR};
    Output<Float> out = {y, n};
    if (m * n * k < 1 << 17) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < m; row++) rows.quantize(x + row * k, row, k);
#pragma omp for schedule(guided)  // see bf16_linear.cpp
        for (int64_t p = 0; p < panels; p++) {
            const uint8_t* w = packed + p * Kind::panel_bytes(columns);
            int64_t tiles = (m + Kind::ROWS - 1) / Kind::ROWS;
            for (int64_t row = 0; tiles; tiles--) {
                int64_t height = (m - row + tiles - 1) / tiles;
                const float* own = scales ? scales + p * PANEL : nullptr;
                Tiles<Kind, Float, Kind::ROWS>::run(height, w, own, rows, row, p * PANEL, out);
                row += height;
            }
        }
    }
    free(rows.values), free(rows.sums), free(rows.scales);
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
