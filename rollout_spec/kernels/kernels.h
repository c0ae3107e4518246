// What the kernels share, and those that a decoder layer is made of; each is described where it is defined.
#pragma once
#include "simd.h"

// row(r) for every row, on several threads if the rows are worth starting them.
template <typename Row>
static void each_row(int64_t rows, int64_t size, int threads, Row row) {
    if (rows * size < 1 << 15) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) row(r);
}

EXPORT void bf16_linear(const bf16* x, int64_t m, int64_t k, int64_t n, const bf16* packed, const bf16* bias, bf16* y,
                        int threads);
EXPORT void quantized_linear(int kind, int is_bf16, const void* x, int64_t m, int64_t k, int64_t n,
                             const uint8_t* packed, const float* scales, void* y, int threads);
EXPORT void attention(int is_bf16, const void* q, int64_t q_stride, const void* keys, const void* values,
                      int64_t head_stride, int64_t block_size, int64_t head_dim, int64_t heads, int64_t kv_heads,
                      const int64_t* tables, int64_t width, const int64_t* sequences, const int64_t* first,
                      const int64_t* last, int64_t rows, void* out, int threads);
EXPORT void store_entries(int64_t size, const void* k, int64_t k_stride, const void* v, int64_t v_stride,
                          const int64_t* cache_rows, int64_t rows, int64_t kv_heads, int64_t head_dim, void* keys,
                          void* values);
EXPORT void rms_norm(int is_bf16, const void* x, const void* weight, int64_t rows, int64_t size, float eps, void* out,
                     int threads);
EXPORT void norm_rotate(int is_bf16, void* x, int64_t stride, const void* weight, const void* cosine,
                        const void* signed_sine, int64_t rows, int64_t heads, int64_t size, float eps, int threads);
EXPORT void gated_silu(int is_bf16, const void* gate_up, int64_t rows, int64_t size, void* out, int threads);
