// What a decoder does between its linears, row by row, rounding to the model's dtype where torch's operations do.
#include "exponential.h"
#include "kernels.h"

namespace {

INLINE void put(float value, float* out) { *out = value; }
INLINE void put(float value, bf16* out) { *out = narrow(value); }
template <typename Float>
INLINE float rounded(float value) {
    return sizeof(Float) == 2 ? widen(narrow(value)) : value;
}

// 1 / sqrt(mean(x^2) + eps), the squares summed over sixteen lanes.
template <typename Float>
float inverse_root_mean_square(const Float* x, int64_t size, float eps) {
    float lanes[PANEL] = {};
    int64_t i = 0;
    for (; i + PANEL <= size; i += PANEL)
        for (int64_t j = 0; j < PANEL; j++) lanes[j] += widen(x[i + j]) * widen(x[i + j]);
    for (; i < size; i++) lanes[i % PANEL] += widen(x[i]) * widen(x[i]);
    for (int width = 8; width; width /= 2)
        for (int j = 0; j < width; j++) lanes[j] += lanes[j + width];
    return 1 / sqrtf(lanes[0] / size + eps);
}

template <typename Float>
void normalize(const Float* x, const Float* weight, int64_t size, float eps, Float* out) {
    float factor = inverse_root_mean_square(x, size, eps);
    for (int64_t i = 0; i < size; i++) put(rounded<Float>(widen(x[i]) * factor) * widen(weight[i]), out + i);
}

// Rotate one head in place; dimension i pairs with i + size / 2.
template <typename Float>
void turn(Float* x, const Float* cosine, const Float* signed_sine, int64_t size) {
    int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = widen(x[i]), b = widen(x[i + half]);
        float low = rounded<Float>(a * widen(cosine[i])) + rounded<Float>(b * widen(signed_sine[i]));
        float high = rounded<Float>(b * widen(cosine[i + half])) + rounded<Float>(a * widen(signed_sine[i + half]));
        put(low, x + i), put(high, x + i + half);
    }
}

template <typename Float>
void gated(const Float* gate, const Float* up, int64_t size, Float* out) {
    for (int64_t i = 0; i < size; i++) {
        float x = widen(gate[i]);
        float silu = x / (1 + exp_of(-x));
        put(rounded<Float>(x == x ? silu : x) * widen(up[i]), out + i);
    }
}

template <typename Float>
void norm_rows(const Float* x, const Float* weight, int64_t rows, int64_t size, float eps, Float* out, int threads) {
    each_row(rows, size, threads, [=](int64_t r) { normalize(x + r * size, weight, size, eps, out + r * size); });
}

template <typename Float>
void norm_rotate_rows(Float* x, int64_t stride, const Float* weight, const Float* cosine, const Float* signed_sine,
                      int64_t rows, int64_t heads, int64_t size, float eps, int threads) {
    each_row(rows, heads * size, threads, [=](int64_t r) {
        for (int64_t h = 0; h < heads; h++) {
            Float* own = x + r * stride + h * size;
            if (weight) normalize(own, weight + h * size, size, eps, own);
            turn(own, cosine + r * size, signed_sine + r * size, size);
        }
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
