// Sixteen float lanes and the few operations the kernels are written in.
//
// Three implementations: AVX2 with FMA; AVX512 with VNNI and BF16; and the latter's operations spelled out in scalar
// code (EMULATE_AVX512), so that the code written for AVX512 can be tested on any machine.
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;

constexpr int64_t PANEL = 16;  // output features that are computed together
constexpr int64_t GROUP = 64;  // weights that share a scale, in the 4-bit kinds
constexpr int64_t PAGE = 4096, CACHE_LINE = 64;  // bytes
constexpr int SECOND_CACHE = 2;                  // for __builtin_prefetch

INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE float widen(bf16 value) { return float_of((uint32_t)value << 16); }
INLINE float widen(float value) { return value; }

// Round to nearest, ties to even; a NaN stays one.
INLINE bf16 narrow(float value) {
    uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return (bits >> 16) | 0x40;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// `narrow` of sixteen values.
INLINE void narrow_panel(const float* x, bf16* out) {
    auto eight = [](const float* p) {
        __m256i bits = _mm256_loadu_si256((const __m256i*)p), high = _mm256_srli_epi32(bits, 16);
        __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
        __m256i near = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
        __m256i size = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
        __m256i is_nan = _mm256_cmpgt_epi32(size, _mm256_set1_epi32(0x7f800000));
        return _mm256_blendv_epi8(near, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), is_nan);
    };
    __m256i both = _mm256_packus_epi32(eight(x), eight(x + 8));
    _mm256_storeu_si256((__m256i*)out, _mm256_permute4x64_epi64(both, 0xd8));
}

template <typename T>
static T* allocate(int64_t count) {
    return (T*)aligned_alloc(64, round_up(count * sizeof(T) + 64, 64));
}

// Rows and panels that bf16 products compute at a time; their sums must find room in the registers.
struct Tile { int rows, panels; };

#if defined(EMULATE_AVX512)
#include "simd_emulated.h"
#elif defined(__AVX512VNNI__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#include "simd_avx512.h"
#else
#include "simd_avx2.h"
#endif
