// What packing needs, in AVX2, which every variant has: 16 rows to lines, and floats to small integers.
#pragma once
#include "simd.h"

namespace {

// 8 rows of 8 words, `stride` words apart, to 8 lines of 16 words, `next` words apart, whose first 8 are filled.
inline void transpose_8x8(const uint32_t* rows, int64_t stride, uint32_t* lines, int64_t next) {
    __m256i r[8], s[8];
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_si256((const __m256i*)(rows + i * stride));
    for (int i = 0; i < 8; i += 2) {
        s[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        s[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_unpacklo_epi64(s[i], s[i + 2]), r[i + 1] = _mm256_unpackhi_epi64(s[i], s[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(s[i + 1], s[i + 3]), r[i + 3] = _mm256_unpackhi_epi64(s[i + 1], s[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_si256((__m256i*)(lines + i * next), _mm256_permute2x128_si256(r[i], r[i + 4], 0x20));
        _mm256_storeu_si256((__m256i*)(lines + (i + 4) * next), _mm256_permute2x128_si256(r[i], r[i + 4], 0x31));
    }
}

// 16 rows of `count` words to `count` lines of 16 words, each followed by the lines of `beside - 1` other sixteens.
inline void rows_to_lines(const uint32_t* rows, int64_t stride, int64_t count, uint32_t* lines, int64_t beside = 1) {
    int64_t i = 0, next = beside * PANEL;
    for (; i + 8 <= count; i += 8) {
        transpose_8x8(rows + i, stride, lines + i * next, next);
        transpose_8x8(rows + 8 * stride + i, stride, lines + i * next + 8, next);
    }
    for (; i < count; i++)
        for (int64_t r = 0; r < PANEL; r++) lines[i * next + r] = rows[r * stride + i];
}

// Four times eight 32-bit integers to bytes, saturated to [-128, 127].
inline __m256i bytes_of(const __m256i (&v)[4]) {
    __m256i pairs = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    return _mm256_permutevar8x32_epi32(pairs, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// out = clip(round((x - offset) * factor), low, high), ties to even; count is a multiple of 32.
inline void round_to_bytes(const float* x, int64_t count, float offset, float factor, int low, int high, int8_t* out) {
    const __m256 o = _mm256_set1_ps(offset), f = _mm256_set1_ps(factor);
    const __m256i least = _mm256_set1_epi8(low), most = _mm256_set1_epi8(high);
    for (int64_t i = 0; i < count; i += 32) {
        __m256i v[4];
        for (int j = 0; j < 4; j++)
            v[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + i + 8 * j), o), f));
        __m256i bytes = _mm256_max_epi8(_mm256_min_epi8(bytes_of(v), most), least);
        _mm256_storeu_si256((__m256i*)(out + i), bytes);
    }
}

}  // namespace
