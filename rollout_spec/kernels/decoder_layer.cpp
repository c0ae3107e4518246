// Decoder layers in one call, or each in two around attention that is somebody else's: what the other kernels do one
// after the other, to the bit, without a way back to the caller in between, which for few rows takes as long as many of
// them.
#include "kernels.h"

namespace {

// A packed weight [n, k]; kind is one of nf4.h's, or BF16. Scales are int8's; bias, [n], is bf16's.
struct Linear {
    int64_t kind, n, k;
    const void *packed, *scales, *bias;
};
constexpr int64_t BF16 = -1;

// Norm weights are [hidden]; input_norm, and qk_norm, [heads + kv_heads, head_dim], may be null.
struct Layer {
    const void *input_norm, *qk_norm, *post_norm;
    Linear qkv, o, gate_up, down;
};

// What all layers of a pass share: the arguments of the kernels by these names; those of the cache are not read by the
// parts of a layer.
struct Pass {
    int64_t is_bf16, rows, hidden, heads, kv_heads, head_dim, block_size, head_stride, width, threads;
    double eps;
    const void *cosine, *signed_sine;
    const int64_t *cache_rows, *tables, *sequences, *first, *last;

    int64_t size() const { return is_bf16 ? sizeof(bf16) : sizeof(float); }
    int64_t bytes(int64_t features) const { return round_up(rows * features * size(), 64); }

    void multiply(const Linear& w, const void* x, void* y) const {
        if (w.kind == BF16)
            bf16_linear((const bf16*)x, rows, w.k, w.n, (const bf16*)w.packed, (const bf16*)w.bias, (bf16*)y, threads);
        else
            quantized_linear(w.kind, is_bf16, x, rows, w.k, w.n, (const uint8_t*)w.packed, (const float*)w.scales, y,
                             threads);
    }

    void add(void* x, const void* y) const {
        if (is_bf16) add_to((bf16*)x, (const bf16*)y);
        else add_to((float*)x, (const float*)y);
    }

    void add_to(bf16* __restrict x, const bf16* __restrict y) const {
        for (int64_t i = 0, count = rows * hidden; i < count; i++) x[i] = narrow(widen(x[i]) + widen(y[i]));
    }
    void add_to(float* __restrict x, const float* __restrict y) const {
        for (int64_t i = 0, count = rows * hidden; i < count; i++) x[i] += y[i];
    }
};

}  // namespace

// Bytes of `scratch`, of which the parts of a layer need less.
EXPORT int64_t decoder_layer_scratch(const Layer* layer, const Pass* pass) {
    return 2 * pass->bytes(pass->hidden) + pass->bytes(layer->qkv.n) + pass->bytes(layer->o.k) +
           pass->bytes(layer->gate_up.n) + pass->bytes(layer->down.k);
}

// What comes before attention: qkv [rows, heads + 2 * kv_heads, head_dim] of x [rows, qkv.k], normed if there is an
// input_norm, then rotated.
EXPORT void decoder_layer_before(const Layer* layer, const Pass* pass, const void* x, void* qkv, char* scratch) {
    const Pass& p = *pass;
    if (layer->input_norm) {
        rms_norm(p.is_bf16, x, layer->input_norm, p.rows, p.hidden, p.eps, scratch, p.threads);
        x = scratch;
    }
    p.multiply(layer->qkv, x, qkv);
    norm_rotate(p.is_bf16, qkv, layer->qkv.n, layer->qk_norm, p.cosine, p.signed_sine, p.rows, p.heads + p.kv_heads,
                p.head_dim, p.eps, p.threads);
}

// What follows it: x, in place, from attended [rows, heads * head_dim].
EXPORT void decoder_layer_after(const Layer* layer, const Pass* pass, void* x, const void* attended, char* scratch) {
    const Pass& p = *pass;
    char *normed = scratch, *added = normed + p.bytes(p.hidden), *gate_up = added + p.bytes(p.hidden);
    char* gated = gate_up + p.bytes(layer->gate_up.n);
    p.multiply(layer->o, attended, added);
    p.add(x, added);
    rms_norm(p.is_bf16, x, layer->post_norm, p.rows, p.hidden, p.eps, normed, p.threads);
    p.multiply(layer->gate_up, normed, gate_up);
    gated_silu(p.is_bf16, gate_up, p.rows, layer->down.k, gated, p.threads);
    p.multiply(layer->down, gated, added);
    p.add(x, added);
}

// `count` layers that follow each other, of one shape; x [rows, hidden], the residual stream, in place. The first reads
// `read` [rows, qkv.k], which may be x. keys and values are the first one's cache, and those of the others lie
// cache_stride bytes apart.
EXPORT void decoder_layers(const Layer* layers, int64_t count, const Pass* pass, void* x, const void* read, char* keys,
                           char* values, int64_t cache_stride, char* scratch) {
    const Pass& p = *pass;
    for (const Layer *layer = layers; layer < layers + count; layer++, keys += cache_stride, values += cache_stride) {
        char *qkv = scratch, *attended = qkv + p.bytes(layer->qkv.n), *rest = attended + p.bytes(layer->o.k);
        int64_t rotated = p.heads + p.kv_heads, stride = layer->qkv.n, head = p.head_dim * p.size();

        decoder_layer_before(layer, pass, layer == layers ? read : x, qkv, rest);
        store_entries(p.size(), qkv + p.heads * head, stride, qkv + rotated * head, stride, p.cache_rows, p.rows,
                      p.kv_heads, p.head_dim, keys, values);
        attention(p.is_bf16, qkv, stride, keys, values, p.head_stride, p.block_size, p.head_dim, p.heads, p.kv_heads,
                  p.tables, p.width, p.sequences, p.first, p.last, p.rows, attended, p.threads);
        decoder_layer_after(layer, pass, x, attended, rest);
    }
}
