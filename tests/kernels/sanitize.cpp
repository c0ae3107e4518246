// Every kernel on buffers of exactly the sizes it is promised, for AddressSanitizer and UBSan to watch.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <initializer_list>

extern "C" {
int64_t bf16_packed_size(int64_t, int64_t);
void bf16_pack(const uint16_t*, int64_t, int64_t, uint16_t*, int);
void bf16_unpack(const uint16_t*, int64_t, int64_t, uint16_t*);
void bf16_linear(const uint16_t*, int64_t, int64_t, int64_t, const uint16_t*, const uint16_t*, uint16_t*, int);
int64_t quantized_size(int, int64_t, int64_t);
void quantize(int, int, const void*, int64_t, int64_t, uint8_t*, float*, int);
void quantized_linear(int, int, const void*, int64_t, int64_t, int64_t, const uint8_t*, const float*, void*, int);
void attention(int, const void*, int64_t, const void*, const void*, int64_t, int64_t, int64_t, int64_t, int64_t,
               const int64_t*, int64_t, const int64_t*, const int64_t*, const int64_t*, int64_t, void*, int);
void rms_norm(int, const void*, const void*, int64_t, int64_t, float, void*, int);
void norm_rotate(int, void*, int64_t, const void*, const void*, const void*, int64_t, int64_t, int64_t, float, int);
void gated_silu(int, const void*, int64_t, int64_t, void*, int);
void uniform_noise(const int64_t*, const int64_t*, const uint32_t*, int64_t, int64_t, float*, int);
void race(const float*, int64_t, int64_t, float*, int64_t, int64_t*, float*, int);
void store_entries(int64_t, const void*, int64_t, const void*, int64_t, const int64_t*, int64_t, int64_t, int64_t, void*,
                   void*);
int64_t decoder_layer_scratch(const void*, const void*);
void decoder_layers(const void*, int64_t, const void*, void*, const void*, char*, char*, int64_t, char*);
}

static int64_t missing = 0;  // places that an output lacks, to see that it is noticed

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
    uint16_t* y = buffer<uint16_t>(m * n > missing ? m * n - missing : m * n);
    uint16_t *packed = buffer<uint16_t>(bf16_packed_size(n, k)), *bias = buffer<uint16_t>(n);
    bf16_pack(weight, n, k, packed, 2);
    bf16_linear(x, m, k, n, packed, nullptr, y, 2);
    bf16_linear(x, m, k, n, packed, bias, y, 1);
    bf16_unpack(packed, n, k, weight);
    free(weight), free(x), free(y), free(packed), free(bias);
}

// Two sequences of one and three blocks; the last block ends the cache, and the last rows fill it.
template <typename Float>
static void attend(int64_t dim, int64_t group, int64_t kv_heads, int64_t block) {
    int64_t heads = group * kv_heads, blocks = 4, rows = 6;
    int64_t tables[] = {1, 0, 0, 0, 2, 3}, sequences[] = {0, 0, 1, 1, 1, 1};
    int64_t first[] = {0, 1, 0, 5, block - 1, 2 * block + 1}, last[] = {1, block, block + 1, 5, 3 * block, 3 * block};
    Float *q = buffer<Float>(rows * heads * dim), *out = buffer<Float>(rows * heads * dim);
    Float *keys = buffer<Float>(kv_heads * blocks * block * dim), *values = buffer<Float>(kv_heads * blocks * block * dim);
    Float *k = buffer<Float>(rows * kv_heads * dim), *v = buffer<Float>(rows * kv_heads * dim);
    int64_t* places = (int64_t*)malloc(rows * kv_heads * sizeof(int64_t));
    for (int64_t i = 0; i < rows * kv_heads; i++) places[i] = kv_heads * blocks * block - 1 - i;
    store_entries(sizeof(Float), k, kv_heads * dim, v, kv_heads * dim, places, rows, kv_heads, dim, keys, values);
    for (int threads : {1, 2})
        attention(sizeof(Float) == 2, q, heads * dim, keys, values, blocks * block * dim, block, dim, heads, kv_heads,
                  tables, 3, sequences, first, last, rows, out, threads);
    free(q), free(out), free(keys), free(values), free(k), free(v), free(places);
}

template <typename Float>
static void elementwise(int64_t rows, int64_t size) {
    int64_t heads = 3, every = 4;
    Float *x = buffer<Float>(rows * size), *weight = buffer<Float>(size), *out = buffer<Float>(rows * size);
    Float *qkv = buffer<Float>(rows * every * 2 * size), *norms = buffer<Float>(heads * 2 * size);
    Float *cosine = buffer<Float>(rows * 2 * size), *sine = buffer<Float>(rows * 2 * size);
    Float* gate_up = buffer<Float>(rows * 2 * size);
    int is_bf16 = sizeof(Float) == 2;
    rms_norm(is_bf16, x, weight, rows, size, 1e-6f, out, 2);
    for (const Float* norm : {(const Float*)norms, (const Float*)nullptr})
        norm_rotate(is_bf16, qkv, every * 2 * size, norm, cosine, sine, rows, heads, 2 * size, 1e-6f, 2);
    gated_silu(is_bf16, gate_up, rows, size, out, 2);
    free(x), free(weight), free(out), free(qkv), free(norms), free(cosine), free(sine), free(gate_up);
}

static void sampling(int64_t rows, int64_t groups) {
    int64_t width = groups + 16;
    int64_t *keys = buffer<int64_t>(rows), *offsets = buffer<int64_t>(3), *tokens = buffer<int64_t>(rows);
    uint32_t* hashes = buffer<uint32_t>(width);
    float *p = buffer<float>(rows * 16 * groups), *noise = buffer<float>(rows * width), *leads = buffer<float>(rows);
    for (int threads : {1, 2}) {
        uniform_noise(keys, offsets, hashes, rows, width, noise, threads);
        race(p, rows, groups, noise, width, tokens, leads, threads);
    }
    for (int64_t r = 0; r < rows; r++)
        if (tokens[r] < 0 || tokens[r] >= 16 * groups) abort();
    free(keys), free(offsets), free(tokens), free(hashes), free(p), free(noise), free(leads);
}

struct Linear {
    int64_t kind, n, k;
    const void *packed, *scales, *bias;
};
struct Layer {
    const void *input_norm, *qk_norm, *post_norm;
    Linear linears[4];
};
struct Pass {
    int64_t is_bf16, rows, hidden, heads, kv_heads, head_dim, block_size, head_stride, width, threads;
    double eps;
    const void *cosine, *signed_sine;
    const int64_t *cache_rows, *tables, *sequences, *first, *last;
};

// Two layers, with one block each for one sequence, and again, the first without a norm; kind -1 is bf16.
template <typename Float>
static void layer(int64_t kind, int64_t rows, int64_t hidden, int64_t width) {
    const int64_t heads = 2, kv_heads = 1, dim = 16, block = 16;
    Float *x = buffer<Float>(rows * hidden), *read = buffer<Float>(rows * hidden);
    Float *norm = buffer<Float>(hidden), *turn = buffer<Float>(rows * dim);
    Float *keys = buffer<Float>(2 * block * dim), *values = buffer<Float>(2 * block * dim), *norms = buffer<Float>(3 * dim);
    int64_t *places = buffer<int64_t>(4 * rows), table = 0;
    int64_t *sequences = places + rows, *first = places + 2 * rows, *last = places + 3 * rows;
    for (int64_t r = 0; r < rows; r++) places[r] = block - 1 - r, sequences[r] = first[r] = 0, last[r] = block - r;
    Layer own = {norm, norms, norm, {}};
    const int64_t shapes[4][2] = {{4 * dim, hidden}, {hidden, 2 * dim}, {2 * width, hidden}, {hidden, width}};
    for (int i = 0; i < 4; i++) {
        int64_t n = shapes[i][0], k = shapes[i][1], size = kind < 0 ? 2 * bf16_packed_size(n, k) : quantized_size(kind, n, k);
        Float* weight = buffer<Float>(n * k);
        void* packed = malloc(size);
        float* scales = kind == 0 ? buffer<float>((n + 15) / 16 * 16) : nullptr;
        if (kind < 0) bf16_pack((const uint16_t*)weight, n, k, (uint16_t*)packed, 1);
        else quantize(kind, sizeof(Float) == 2, weight, n, k, (uint8_t*)packed, scales, 1);
        own.linears[i] = {kind, n, k, packed, scales, nullptr};
        free(weight);
    }
    Pass pass = {sizeof(Float) == 2, rows, hidden, heads, kv_heads, dim, block, block * dim, 1, 2, 1e-6, turn, turn,
                 places, &table, sequences, first, last};
    char* scratch = (char*)malloc(decoder_layer_scratch(&own, &pass));
    Layer layers[2] = {own, own};
    for (const void* reads : {x, read}) {
        decoder_layers(layers, 2, &pass, x, reads, (char*)keys, (char*)values, block * dim * sizeof(Float), scratch);
        layers[0].input_norm = nullptr;
    }
    for (Linear& linear : own.linears) free((void*)linear.packed), free((void*)linear.scales);
    free(x), free(read), free(norm), free(turn), free(keys), free(values), free(norms), free(places), free(scratch);
}

int main(int count, char**) {
    missing = count - 1;
    for (int64_t size : {1, 5, 16, 33, 64})
        for (int64_t rows : {0, 1, 3, 400}) elementwise<uint16_t>(rows, size), elementwise<float>(rows, size);
    for (int64_t groups : {1, 2, 7, 64, 500})
        for (int64_t rows : {0, 1, 3, 40}) sampling(rows, groups);
    for (int64_t dim : {16, 64, 80, 128})
        for (int64_t group : {1, 3})
            for (int64_t block : {8, 16, 64}) attend<uint16_t>(dim, group, 2, block), attend<float>(dim, group, 2, block);

    for (int64_t rows : {1, 3, 7})
        for (int64_t size : {5, 64, 130}) {
            for (int64_t kind = -1; kind < 3; kind++) layer<uint16_t>(kind, rows, size, size + 3);
            for (int64_t kind = 0; kind < 3; kind++) layer<float>(kind, rows, size, size + 3);
        }

    const int64_t sizes[] = {1, 2, 15, 16, 17, 33, 63, 64, 65, 130};
    for (int64_t n : sizes)
        for (int64_t k : sizes)
            for (int64_t m : {0, 1, 2, 3, 5, 7, 13, 32}) {
                bf16(m, n, k);
                for (int kind = 0; kind < 3; kind++) quantized<uint16_t>(kind, m, n, k), quantized<float>(kind, m, n, k);
            }
    for (int64_t m : {17, 33, 49, 65, 81})  // more rows than a tile or a register holds, and not a multiple of it
        for (int64_t k : {31, 65}) {
            bf16(m, 17, k);
            for (int kind = 0; kind < 3; kind++) quantized<uint16_t>(kind, m, 17, k), quantized<float>(kind, m, 17, k);
        }
    for (int64_t m : {1, 5, 7, 17, 32, 49})  // columns of several chunks
        for (int64_t k : {600, 1030}) bf16(m, 70, k);
    puts("clean");
}
