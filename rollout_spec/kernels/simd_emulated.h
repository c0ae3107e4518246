// The operations of simd_avx512.h in scalar code, for tests.
#pragma once

typedef bf16 bf16_operand;
typedef int8_t int8_operand;
constexpr int BF16_PANELS = 4, BF16_FEW_ROWS = 3, BF16_CHUNK = 1 << 12;
constexpr Tile BF16_FEW = {2, 4}, BF16_MANY = {4, 2};  // small: they have to compile
constexpr int INT8_ROWS = 3, INT4_ROWS = 3;

#undef INLINE
#define INLINE static __attribute__((noinline, unused))

struct F16 { float v[16]; };
struct I16 { int32_t v[16]; };
#define EACH_LANE for (int i = 0; i < 16; i++)

INLINE F16 zeros() { return {}; }
INLINE F16 load(const float* p) { F16 r; memcpy(r.v, p, 64); return r; }
INLINE void store(float* p, F16 x) { memcpy(p, x.v, 64); }
INLINE F16 fma(F16 x, F16 y, F16 z) { EACH_LANE z.v[i] = fmaf(x.v[i], y.v[i], z.v[i]); return z; }
INLINE F16 fma(F16 x, float y, F16 z) { EACH_LANE z.v[i] = fmaf(x.v[i], y, z.v[i]); return z; }
INLINE F16 scaled(F16 x, float y) { EACH_LANE x.v[i] *= y; return x; }
INLINE F16 load(const bf16* p) { F16 r; EACH_LANE r.v[i] = widen(p[i]); return r; }

INLINE I16 izeros() { return {}; }
INLINE F16 to_float(I16 x) { F16 r; EACH_LANE r.v[i] = (float)x.v[i]; return r; }
INLINE I16 plus(I16 x, int32_t n) { EACH_LANE x.v[i] += n; return x; }
INLINE I16 plus(I16 x, I16 y) { EACH_LANE x.v[i] += y.v[i]; return x; }
INLINE I16 load_line(const void* p) { I16 r; memcpy(r.v, p, 64); return r; }

template <typename Function>
INLINE I16 each_byte(I16 x, Function f) {
    uint8_t bytes[64];
    memcpy(bytes, x.v, 64);
    for (int i = 0; i < 64; i++) bytes[i] = f(bytes[i], i);
    memcpy(x.v, bytes, 64);
    return x;
}
INLINE I16 low_nibbles(I16 x) { return each_byte(x, [](uint8_t b, int) { return b & 15; }); }
INLINE I16 high_nibbles(I16 x) { return each_byte(x, [](uint8_t b, int) { return b >> 4; }); }
INLINE I16 flip_signs(I16 x) { return each_byte(x, [](uint8_t b, int) { return b ^ 0x80; }); }
INLINE I16 load_table_of(const uint8_t* p) { I16 r; for (int i = 0; i < 4; i++) memcpy(r.v + 4 * i, p, 16); return r; }
INLINE I16 look_up(I16 table, I16 codes) {
    uint8_t entries[64];
    memcpy(entries, table.v, 64);
    return each_byte(codes, [&](uint8_t b, int i) { return b & 0x80 ? 0 : entries[i / 16 * 16 + (b & 15)]; });
}
INLINE I16 dot_bytes(I16 sum, I16 w, int32_t x) {
    uint8_t a[64];
    int8_t b[4];
    memcpy(a, w.v, 64), memcpy(b, &x, 4);
    EACH_LANE for (int j = 0; j < 4; j++) sum.v[i] += (int32_t)a[4 * i + j] * b[j];
    return sum;
}
INLINE F16 dot_bf16(F16 sum, I16 w, int32_t x) {
    EACH_LANE {
        uint32_t a = (uint32_t)w.v[i], b = (uint32_t)x;
        float odd = float_of(a & 0xffff0000) * float_of(b & 0xffff0000);
        sum.v[i] = (sum.v[i] + odd) + float_of(a << 16) * float_of(b << 16);
    }
    return sum;
}

#include "simd_dots.h"
