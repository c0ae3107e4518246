// The noise of sampling and the coupled choice that it decides, to the bit what `sampling/noise.py` and
// `sampling/verify.py` do in torch's operations: many, on rows so short that starting them takes most of the time.
#include "kernels.h"

namespace {

constexpr int64_t MEMBERS = 16;  // tokens of a group

INLINE uint64_t mixed(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

void uniform_row(int64_t key, const int64_t* offsets, const uint32_t* hashes, int64_t size, float* out) {
    uint32_t word[6];
    for (int i = 0; i < 3; i++) {
        uint64_t pair = mixed((uint64_t)key + (uint64_t)offsets[i]);
        word[2 * i] = (uint32_t)pair, word[2 * i + 1] = (uint32_t)(pair >> 32);
    }
    for (int64_t i = 0; i < size; i++) {
        uint32_t x = hashes[i] * (word[0] | 1) + word[1];
        x = (x ^ x >> 16) * 0x7FEB352Du + word[2];
        x = (x ^ x >> 15) * 0x846CA68Bu + word[3];
        uint32_t whole = (x ^ x >> 16) * (word[4] | 1) + word[5];
        float v = (float)(int32_t)whole + (0.25f + 0x1p-20f) + (float)(int32_t)x * 0x1p-33f;
        out[i] = fabsf(v) * (-0x1p-31f * (1 - 0x1p-24f));
    }
}

struct Winner {
    int64_t index;
    float value, second;
};

// As torch's argmax, of equals the first. Softmax makes a row NaN throughout or nowhere: then it is the first, too.
Winner winner(const float* values, int64_t count) {
    Winner best = {0, values[0], -INFINITY};
    for (int64_t i = 1; i < count; i++) {
        if (values[i] > best.value) best = {i, values[i], best.value};
        else if (values[i] > best.second) best.second = values[i];
    }
    return best;
}

void race_row(const float* p, int64_t groups, float* noise, const float* members, int64_t* token, float* lead) {
    for (int64_t g = 0; g < groups; g++) {
        float mass[MEMBERS / 2];
        for (int m = 0; m < MEMBERS / 2; m++) mass[m] = p[2 * m * groups + g] + p[(2 * m + 1) * groups + g];
        for (int m = 0; m < MEMBERS / 4; m++) mass[m] = mass[2 * m] + mass[2 * m + 1];
        for (int m = 0; m < MEMBERS / 8; m++) mass[m] = mass[2 * m] + mass[2 * m + 1];
        noise[g] = (mass[0] + mass[1]) / noise[g];
    }
    Winner group = winner(noise, groups);
    float inside[MEMBERS];
    for (int m = 0; m < MEMBERS; m++) inside[m] = p[m * groups + group.index] / members[m];
    Winner member = winner(inside, MEMBERS);
    *token = member.index * groups + group.index;
    float a = group.value / group.second, b = member.value / member.second;
    *lead = a < b ? a : b;
}

}  // namespace

// What `noise.exponential` takes the logarithm of: out [rows, size] from keys [rows], the stream's offsets [3] and the
// hashes of the vocabulary [size].
EXPORT void uniform_noise(const int64_t* keys, const int64_t* offsets, const uint32_t* hashes, int64_t rows,
                          int64_t size, float* out, int threads) {
    each_row(rows, size, threads,
             [=](int64_t r) { uniform_row(keys[r], offsets, hashes, size, out + r * size); });
}

// The coupled choice: tokens [rows], and the lead of each in its race [rows], as a ratio, from p [rows, 16 * groups]
// and noise [rows, width], whose last 16 columns are the members'; the groups' part is written over.
EXPORT void race(const float* p, int64_t rows, int64_t groups, float* noise, int64_t width, int64_t* tokens,
                 float* leads, int threads) {
    each_row(rows, MEMBERS * groups, threads, [=](int64_t r) {
        float* own = noise + r * width;
        race_row(p + r * MEMBERS * groups, groups, own, own + width - MEMBERS, tokens + r, leads + r);
    });
}
