// Every kernel on buffers of exactly the sizes it is promised, for AddressSanitizer and UBSan to watch.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

extern "C" {
int64_t bf16_packed_size(int64_t, int64_t);
void bf16_pack(const uint16_t*, int64_t, int64_t, uint16_t*, int);
void bf16_unpack(const uint16_t*, int64_t, int64_t, uint16_t*);
void bf16_linear(const uint16_t*, int64_t, int64_t, int64_t, const uint16_t*, const uint16_t*, uint16_t*, int);
int64_t quantized_size(int, int64_t, int64_t);
void quantize(int, int, const void*, int64_t, int64_t, uint8_t*, float*, int);
void quantized_linear(int, int, const void*, int64_t, int64_t, int64_t, const uint8_t*, const float*, void*, int);
}

#ifdef BREAK_ON_PURPOSE
constexpr int SHORT = 1;  // the last output has no place
#else
constexpr int SHORT = 0;
#endif

template <typename T>
static T* buffer(int64_t count) {
    T* data = (T*)malloc(count * sizeof(T));
    for (int64_t i = 0; i < count; i++) data[i] = (T)(sizeof(T) == 4 ? rand() % 2001 - 1000 : 0x3c00 + rand() % 0x400);
    return data;
}

template <typename Float>
static void quantized(int kind, int64_t m, int64_t n, int64_t k) {
    Float *weight = buffer<Float>(n * k), *x = buffer<Float>(m * k), *y = buffer<Float>(m * n);
    int64_t size = quantized_size(kind, n, k);
    uint8_t* packed = (uint8_t*)malloc(size);
    float* scales = kind == 0 ? buffer<float>((n + 15) / 16 * 16) : nullptr;
    quantize(kind, sizeof(Float) == 2, weight, n, k, packed, scales, 2);
    quantized_linear(kind, sizeof(Float) == 2, x, m, k, n, packed, scales, y, 2);
    free(weight), free(x), free(y), free(packed), free(scales);
}

static void bf16(int64_t m, int64_t n, int64_t k) {
    uint16_t *weight = buffer<uint16_t>(n * k), *x = buffer<uint16_t>(m * k);
    uint16_t* y = buffer<uint16_t>(m * n > SHORT ? m * n - SHORT : m * n);
    uint16_t *packed = buffer<uint16_t>(bf16_packed_size(n, k)), *bias = buffer<uint16_t>(n);
    bf16_pack(weight, n, k, packed, 2);
    bf16_linear(x, m, k, n, packed, nullptr, y, 2);
    bf16_linear(x, m, k, n, packed, bias, y, 1);
    bf16_unpack(packed, n, k, weight);
    free(weight), free(x), free(y), free(packed), free(bias);
}

int main() {
    const int64_t sizes[] = {1, 2, 15, 16, 17, 33, 63, 64, 65, 130};
    for (int64_t n : sizes)
        for (int64_t k : sizes)
            for (int64_t m : {0, 1, 2, 3, 5, 7, 13, 32}) {
                bf16(m, n, k);
                for (int kind = 0; kind < 3; kind++) quantized<uint16_t>(kind, m, n, k), quantized<float>(kind, m, n, k);
            }
    puts("clean");
}
