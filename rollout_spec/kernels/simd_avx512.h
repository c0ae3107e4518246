// AVX512 with VNNI and BF16: sixteen lanes are one register.
#pragma once

typedef bf16 bf16_operand;
typedef int8_t int8_operand;
constexpr int BF16_PANELS = 4, BF16_FEW_ROWS = 0, BF16_CHUNK = 1 << 16;
constexpr Tile BF16_FEW = {6, 4}, BF16_MANY = BF16_FEW;
constexpr int INT8_ROWS = 8, INT4_ROWS = 8;

typedef __m512 F16;
typedef __m512i I16;

INLINE F16 zeros() { return _mm512_setzero_ps(); }
INLINE F16 load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, F16 v) { _mm512_storeu_ps(p, v); }
INLINE F16 fma(F16 x, F16 y, F16 z) { return _mm512_fmadd_ps(x, y, z); }
INLINE F16 fma(F16 x, float y, F16 z) { return _mm512_fmadd_ps(x, _mm512_set1_ps(y), z); }
INLINE F16 scaled(F16 x, float y) { return _mm512_mul_ps(x, _mm512_set1_ps(y)); }
INLINE F16 load(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

INLINE I16 izeros() { return _mm512_setzero_si512(); }
INLINE F16 to_float(I16 v) { return _mm512_cvtepi32_ps(v); }
INLINE I16 plus(I16 v, int32_t n) { return _mm512_add_epi32(v, _mm512_set1_epi32(n)); }
INLINE I16 plus(I16 v, I16 w) { return _mm512_add_epi32(v, w); }
INLINE I16 load_line(const void* p) { return _mm512_loadu_si512(p); }
INLINE I16 low_nibbles(I16 v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
INLINE I16 high_nibbles(I16 v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
INLINE I16 flip_signs(I16 v) { return _mm512_xor_si512(v, _mm512_set1_epi8((char)0x80)); }
INLINE I16 load_table_of(const uint8_t* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }
INLINE I16 look_up(I16 table, I16 codes) { return _mm512_shuffle_epi8(table, codes); }
// sum + the four products of unsigned bytes of w and the signed bytes of x, per lane
INLINE I16 dot_bytes(I16 sum, I16 w, int32_t x) { return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x)); }
// sum + the two products of bf16 pairs, per lane
INLINE F16 dot_bf16(F16 sum, I16 w, int32_t x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(x));
}

#include "simd_dots.h"
