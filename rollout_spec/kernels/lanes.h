// As many floats as a register holds, in the compiler's notation for vectors, and what is done with them element by
// element. An element's bits are those of the same operations in scalar code, wherever it lies.
#pragma once
#include "simd.h"

#ifdef __AVX512F__
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

// Call use(i, count) for every stretch of at most LANES of `size` elements.
template <typename Use>
INLINE void each_stretch(int64_t size, Use use) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) use(i, LANES);
    if (i < size) use(i, size - i);
}

// The first `count` lanes from memory, zeros in the others; and to memory.
INLINE Floats lanes(const float* x, int64_t count) {
    Floats v = {};
    memcpy(&v, x, count * sizeof *x);
    return v;
}
INLINE Floats lanes(const bf16* x, int64_t count) {
    Halves v = {};
    memcpy(&v, x, count * sizeof *x);
    return (Floats)(__builtin_convertvector(v, Words) << 16);
}
INLINE Words nearest_bf16(Floats x) {  // see narrow
    Words bits = (Words)x, near = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return x == x ? near : bits >> 16 | 0x40;
}
INLINE void put(Floats x, int64_t count, float* out) { memcpy(out, &x, count * sizeof *out); }
INLINE void put(Floats x, int64_t count, bf16* out) {
    Halves v = __builtin_convertvector(nearest_bf16(x), Halves);
    memcpy(out, &v, count * sizeof *out);
}

// Rounded to what `Float` can hold.
template <typename Float>
INLINE Floats rounded(Floats x) {
    return sizeof(Float) == 2 ? (Floats)(nearest_bf16(x) << 16) : x;
}

// The sum over the lanes, halves of them at a time.
INLINE float total(Floats x) {
    float v[LANES];
    memcpy(v, &x, sizeof v);
    for (int64_t width = LANES / 2; width; width /= 2)
        for (int64_t i = 0; i < width; i++) v[i] += v[i + width];
    return v[0];
}

// exp(x) to about 1e-7 (Cephes' expf); of a NaN it is one.
INLINE Floats exp_of(Floats x) {
    const float whole = 12582912.0f;  // added and taken away again, it rounds what is less than 2^22
    Floats y = x < -87.0f ? Floats{} - 87.0f : x > 87.0f ? Floats{} + 87.0f : x;
    Floats n = (y * 1.44269504f + whole) - whole;
    Floats r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return x == x ? p * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23) : x;
}
