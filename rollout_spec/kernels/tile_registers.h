// AMX: eight registers of at most sixteen lines of 64 bytes, and products of two of them that are added to a third; or
// the same in scalar code (EMULATE_AVX512), but for subnormals, which AMX takes for zeros. Only variants with
// TILE_REGISTERS have them.
//
// Sums are kept in registers 0 to 3, rows in 4 and 5, weights in 6 and 7. A product is summed line by line: what comes
// out depends on its own line of the rows alone.
#pragma once
#include "simd.h"

constexpr int64_t REGISTER_ROWS = 16;
constexpr int SUMS = 0, ROWS_AT = 4, WEIGHTS_AT = 6;

#ifdef TILE_REGISTERS

namespace {

// What `ldtilecfg` reads: registers of sums and rows hold `height` lines, those of weights all sixteen.
struct alignas(64) RegisterShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t line_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t lines[16];
    explicit RegisterShapes(int64_t height) : lines{} {
        for (int i = 0; i < 8; i++) lines[i] = i < WEIGHTS_AT ? height : REGISTER_ROWS;
    }
};
static_assert(sizeof(RegisterShapes) == 64, "as the processor reads it");

#ifdef EMULATE_AVX512

struct Register { uint8_t lines[16][64]; };
static thread_local Register contents[8];
static thread_local int64_t lines_of[8];

struct TileRegisters {
    explicit TileRegisters(int64_t height) {
        RegisterShapes shapes(height);
        for (int i = 0; i < 8; i++) lines_of[i] = shapes.lines[i];
    }
};

template <int T>
INLINE void clear() { memset(contents[T].lines, 0, sizeof contents[T].lines); }
template <int T>
INLINE void read(const void* p, int64_t stride) {
    for (int64_t i = 0; i < lines_of[T]; i++) memcpy(contents[T].lines[i], (const char*)p + i * stride, 64);
}
template <int T>
INLINE void write(void* p, int64_t stride) {
    for (int64_t i = 0; i < lines_of[T]; i++) memcpy((char*)p + i * stride, contents[T].lines[i], 64);
}

// Of every line of rows and every column of weights PARTS sums, one for each place in a word, are added to the sums.
template <typename Sum, typename Factor, int PARTS, typename Widen>
void multiply_add(Register& sums, const Register& rows, const Register& weights, int64_t height, Widen widened) {
    for (int64_t m = 0; m < height; m++)
        for (int n = 0; n < 16; n++) {
            Sum sum, parts[PARTS] = {};
            for (int k = 0; k < 16; k++) {
                Factor x[PARTS], w[PARTS];
                memcpy(x, rows.lines[m] + 4 * k, 4), memcpy(w, weights.lines[k] + 4 * n, 4);
                for (int i = 0; i < PARTS; i++) parts[i] += widened(x[i]) * widened(w[i]);
            }
            for (int i = 1; i < PARTS; i++) parts[0] += parts[i];
            memcpy(&sum, sums.lines[m] + 4 * n, 4);
            sum += parts[0];
            memcpy(sums.lines[m] + 4 * n, &sum, 4);
        }
}
template <int SUM, int ROW, int WEIGHT>
INLINE void multiply_bf16() {
    multiply_add<float, bf16, 2>(contents[SUM], contents[ROW], contents[WEIGHT], lines_of[ROW],
                                 [](bf16 x) { return widen(x); });
}
template <int SUM, int ROW, int WEIGHT>
INLINE void multiply_int8() {
    multiply_add<int32_t, int8_t, 4>(contents[SUM], contents[ROW], contents[WEIGHT], lines_of[ROW],
                                     [](int8_t x) { return (int32_t)x; });
}

#else

// This thread's registers, from here to the end of the block.
struct TileRegisters {
    explicit TileRegisters(int64_t height) {
        RegisterShapes shapes(height);
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~TileRegisters() { asm volatile("tilerelease"); }
};

template <int T>
INLINE void clear() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T>
INLINE void read(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
INLINE void write(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int SUM, int ROW, int WEIGHT>
INLINE void multiply_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(ROW), "i"(WEIGHT));
}
template <int SUM, int ROW, int WEIGHT>
INLINE void multiply_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(ROW), "i"(WEIGHT));
}

#endif

}  // namespace

#else

namespace {

struct TileRegisters {
    explicit TileRegisters(int64_t) {}
};

}  // namespace

#endif
