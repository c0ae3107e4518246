// What a decoder does between its linears, row by row, rounding to the model's dtype where torch's operations do.
#include "kernels.h"
#include "lanes.h"

namespace {

constexpr int64_t HEADS = 16;  // that are normalised together: none waits for the sum of another

// out = x / sqrt(mean(x^2) + eps), rounded, times weight, for `count` stretches of `size` elements.
template <typename Float>
INLINE void normalize(const Float* x, const Float* weight, int64_t count, int64_t size, float eps, Float* out) {
    float factors[HEADS];
    for (; count > 0; count -= HEADS, x += HEADS * size, weight += HEADS * size, out += HEADS * size) {
        int64_t some = least(count, HEADS);
        for (int64_t h = 0; h < some; h++) {
            Floats squares = {};
            each_stretch(size, [&](int64_t i, int64_t n) {
                Floats v = lanes(x + h * size + i, n);
                squares += v * v;
            });
            factors[h] = total(squares);
        }
        for (int64_t h = 0; h < some; h++) factors[h] = 1 / sqrtf(factors[h] / size + eps);
        for (int64_t h = 0; h < some; h++)
            each_stretch(size, [&](int64_t i, int64_t n) {
                int64_t at = h * size + i;
                put(rounded<Float>(lanes(x + at, n) * factors[h]) * lanes(weight + at, n), n, out + at);
            });
    }
}

// Rotate one head in place; dimension i pairs with i + size / 2.
template <typename Float>
INLINE void turn(Float* x, const Float* cosine, const Float* signed_sine, int64_t size) {
    int64_t half = size / 2;
    each_stretch(half, [&](int64_t i, int64_t n) {
        int64_t j = i + half;
        Floats a = lanes(x + i, n), b = lanes(x + j, n);
        Floats low = rounded<Float>(a * lanes(cosine + i, n)) + rounded<Float>(b * lanes(signed_sine + i, n));
        Floats high = rounded<Float>(b * lanes(cosine + j, n)) + rounded<Float>(a * lanes(signed_sine + j, n));
        put(low, n, x + i), put(high, n, x + j);
    });
}

template <typename Float>
INLINE void gated(const Float* gate, const Float* up, int64_t size, Float* out) {
    each_stretch(size, [&](int64_t i, int64_t n) {
        Floats x = lanes(gate + i, n);
        put(rounded<Float>(x / (1 + exp_of(-x))) * lanes(up + i, n), n, out + i);
    });
}

template <typename Float>
void norm_rows(const Float* x, const Float* weight, int64_t rows, int64_t size, float eps, Float* out, int threads) {
    each_row(rows, size, threads, [=](int64_t r) { normalize(x + r * size, weight, 1, size, eps, out + r * size); });
}

template <typename Float>
void norm_rotate_rows(Float* x, int64_t stride, const Float* weight, const Float* cosine, const Float* signed_sine,
                      int64_t rows, int64_t heads, int64_t size, float eps, int threads) {
    each_row(rows, heads * size, threads, [=](int64_t r) {
        Float* own = x + r * stride;
        if (weight) normalize(own, weight, heads, size, eps, own);
        for (int64_t h = 0; h < heads; h++) turn(own + h * size, cosine + r * size, signed_sine + r * size, size);
    });
}

template <typename Float>
void gated_rows(const Float* gate_up, int64_t rows, int64_t size, Float* out, int threads) {
    each_row(rows, size, threads, [=](int64_t r) {
        gated(gate_up + r * 2 * size, gate_up + (r * 2 + 1) * size, size, out + r * size);
    });
}

}  // namespace

// x and out [rows, size], weight [size].
EXPORT void rms_norm(int is_bf16, const void* x, const void* weight, int64_t rows, int64_t size, float eps, void* out,
                     int threads) {
    if (is_bf16) norm_rows((const bf16*)x, (const bf16*)weight, rows, size, eps, (bf16*)out, threads);
    else norm_rows((const float*)x, (const float*)weight, rows, size, eps, (float*)out, threads);
}

// In place: the first `heads` heads of every row of x [rows, .., size], rows `stride` apart, are normalised if weight
// [heads, size] is given, and rotated by cosine and signed_sine [rows, size].
EXPORT void norm_rotate(int is_bf16, void* x, int64_t stride, const void* weight, const void* cosine,
                        const void* signed_sine, int64_t rows, int64_t heads, int64_t size, float eps, int threads) {
    if (is_bf16)
        norm_rotate_rows((bf16*)x, stride, (const bf16*)weight, (const bf16*)cosine, (const bf16*)signed_sine, rows,
                         heads, size, eps, threads);
    else
        norm_rotate_rows((float*)x, stride, (const float*)weight, (const float*)cosine, (const float*)signed_sine, rows,
                         heads, size, eps, threads);
}

// silu(gate) * up of gate_up [rows, 2 * size], gate first; out [rows, size].
EXPORT void gated_silu(int is_bf16, const void* gate_up, int64_t rows, int64_t size, void* out, int threads) {
    if (is_bf16) gated_rows((const bf16*)gate_up, rows, size, (bf16*)out, threads);
    else gated_rows((const float*)gate_up, rows, size, (float*)out, threads);
}
