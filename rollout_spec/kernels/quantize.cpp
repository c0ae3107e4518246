// Quantize a weight and lay it out for quantized_linear.cpp, panels in parallel, in one pass over memory.
#include "layout.h"
#include "nf4.h"

namespace {

constexpr int WIDTH = 8;  // floats of a register

struct Range {
    float low, high, largest;  // largest absolute value
    bool finite;
};

// What `pick` picks of eight lanes, in all of them.
template <typename Pick>
INLINE __m256 of_all_lanes(__m256 x, Pick pick) {
    x = pick(x, _mm256_permute2f128_ps(x, x, 1));
    x = pick(x, _mm256_permute_ps(x, 0x4e));
    return pick(x, _mm256_permute_ps(x, 0xb1));
}

Range range_of(const float* x, int64_t count) {
    const __m256 size = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 low = _mm256_loadu_ps(x), high = low;
    __m256i most = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; i += WIDTH) {
        __m256 v = _mm256_loadu_ps(x + i);
        low = _mm256_min_ps(v, low), high = _mm256_max_ps(v, high);
        most = _mm256_max_epi32(most, _mm256_castps_si256(_mm256_and_ps(v, size)));  // NaN and infinity are largest
    }
    auto smaller = [](__m256 a, __m256 b) { return _mm256_min_ps(a, b); };
    auto larger = [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); };
    auto larger_bits = [](__m256 a, __m256 b) {
        return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
    };
    float largest = _mm256_cvtss_f32(of_all_lanes(_mm256_castsi256_ps(most), larger_bits));
    return {_mm256_cvtss_f32(of_all_lanes(low, smaller)), _mm256_cvtss_f32(of_all_lanes(high, larger)), largest,
            bits_of(largest) < 0x7f800000};
}

// Between the levels code and code + 1.
float boundary(int code) { return (NF4_LEVELS[code] + NF4_LEVELS[code + 1]) / 2; }

// Boundaries that decide the third and the fourth bit, by the last three bits of minus what is found before.
struct Boundaries {
    float third[8], fourth[8];
    Boundaries() {
        for (int found = 0; found < 8; found++) {
            third[-found & 7] = boundary(4 * (found % 4) + 1);
            fourth[-found & 7] = boundary(2 * found);
        }
    }
};
const Boundaries BOUNDARIES;

// A bit of the codes at a time, from the highest; comparisons give minus a bit.
void nf4_codes(const float* x, int64_t count, float largest, int8_t* codes) {
    const __m256 thirds = _mm256_loadu_ps(BOUNDARIES.third), fourths = _mm256_loadu_ps(BOUNDARIES.fourth);
    const __m256 inverse = _mm256_set1_ps(1 / largest);
    const __m256 low = _mm256_set1_ps(boundary(3)), middle = _mm256_set1_ps(boundary(7));
    const __m256 high = _mm256_set1_ps(boundary(11));
    auto above = [](__m256 v, __m256 boundary) { return _mm256_castps_si256(_mm256_cmp_ps(v, boundary, _CMP_GT_OQ)); };
    auto append = [](__m256i found, __m256i bit) { return _mm256_add_epi32(_mm256_add_epi32(found, found), bit); };
    for (int64_t i = 0; i < count; i += 4 * WIDTH) {
        __m256i four[4];
        for (int part = 0; part < 4; part++) {
            __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + i + part * WIDTH), inverse);
            __m256i found = above(v, middle);
            found = append(found, above(v, _mm256_blendv_ps(low, high, _mm256_castsi256_ps(found))));
            found = append(found, above(v, _mm256_permutevar8x32_ps(thirds, found)));
            found = append(found, above(v, _mm256_permutevar8x32_ps(fourths, found)));
            four[part] = _mm256_sub_epi32(_mm256_setzero_si256(), found);
        }
        _mm256_storeu_si256((__m256i*)(codes + i), bytes_of(four));
    }
}

const float NOT_FINITE = float_of(0x7fc00000);

struct Panel {
    float* x;        // one row
    int8_t* codes;   // [16, columns]
    bf16* scales;    // [16, groups]
    bf16* offsets;   // [16, groups]
};

void quantize_row(int kind, const Panel& panel, int64_t r, int64_t columns, float* row_scale) {
    int8_t* codes = panel.codes + r * columns;
    int64_t groups = columns / GROUP;
    if (kind == INT8) {
        Range range = range_of(panel.x, columns);
        float scale = (range.largest > 1e-30f ? range.largest : 1e-30f) / 127;
        *row_scale = range.finite ? scale : NOT_FINITE;
        if (range.finite) round_to_bytes(panel.x, columns, 0, 1 / scale, -127, 127, codes);
        else memset(codes, 0, columns);
        return;
    }
    for (int64_t g = 0; g < groups; g++) {
        const float* x = panel.x + g * GROUP;
        int8_t* own = codes + g * GROUP;
        Range range = range_of(x, GROUP);
        bf16 &scale = panel.scales[r * groups + g], &offset = panel.offsets[r * groups + g];
        if (!range.finite) {
            scale = narrow(NOT_FINITE), offset = 0;
            memset(own, 0, GROUP);
        } else if (kind == INT4) {
            float step = (range.high - range.low) / 15;
            scale = narrow(step > 1e-30f ? step : 1e-30f), offset = narrow(range.low);
            round_to_bytes(x, GROUP, widen(offset), 1 / widen(scale), 0, 15, own);
        } else {
            float largest = range.largest > 1e-30f ? range.largest : 1e-30f;
            scale = narrow(largest / 32);
            nf4_codes(x, GROUP, largest, own);
        }
    }
}

void lay_out_nibbles(int kind, const Panel& panel, int64_t columns, uint8_t* out) {
    int64_t groups = columns / GROUP;
    uint32_t* words = (uint32_t*)panel.codes;  // eight codes, then in their place the word that holds them
    for (int64_t i = 0; i < PANEL * columns / 8; i++) words[i] = words[2 * i] | words[2 * i + 1] << 4;
    for (int64_t g = 0; g < groups; g++) {
        rows_to_lines(words + g * GROUP / 8, columns / 8, GROUP / 8, (uint32_t*)out);
        out += GROUP * PANEL / 2;
        bf16* affine = (bf16*)out;
        for (int64_t r = 0; r < PANEL; r++) affine[r] = panel.scales[r * groups + g];
        out += 2 * PANEL;
        if (kind == INT4) {
            for (int64_t r = 0; r < PANEL; r++) affine[PANEL + r] = panel.offsets[r * groups + g];
            out += 2 * PANEL;
        }
    }
}

int64_t panel_bytes(int kind, int64_t columns) {
    if (kind == INT8) return columns * PANEL;
    return columns / GROUP * (GROUP * PANEL / 2 + (kind == INT4 ? 4 : 2) * PANEL);
}

template <typename Float>
void quantize_panel(int kind, const Float* weight, int64_t n, int64_t k, int64_t p, const Panel& panel, uint8_t* packed,
                    float* scales) {
    int64_t columns = round_up(k, GROUP);
    for (int64_t r = 0; r < PANEL; r++) {
        int64_t row = p * PANEL + r, filled = row < n ? k : 0;
        for (int64_t i = 0; i < filled; i++) panel.x[i] = widen(weight[row * k + i]);
        for (int64_t i = filled; i < columns; i++) panel.x[i] = 0;
        quantize_row(kind, panel, r, columns, scales + row);
    }
    uint8_t* out = packed + p * panel_bytes(kind, columns);
    if (kind == INT8) rows_to_lines((const uint32_t*)panel.codes, columns / 4, columns / 4, (uint32_t*)out);
    else lay_out_nibbles(kind, panel, columns, out);
}

}  // namespace

// Bytes of the packed form of a weight [n, k].
EXPORT int64_t quantized_size(int kind, int64_t n, int64_t k) {
    return round_up(n, PANEL) / PANEL * panel_bytes(kind, round_up(k, GROUP));
}

// weight [n, k] contiguous, float32 or (is_bf16) bf16; scales [n rounded up to 16] for int8, else unused.
EXPORT void quantize(int kind, int is_bf16, const void* weight, int64_t n, int64_t k, uint8_t* packed, float* scales,
                     int threads) {
    int64_t panels = round_up(n, PANEL) / PANEL, columns = round_up(k, GROUP), groups = columns / GROUP;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Panel panel = {allocate<float>(columns), allocate<int8_t>(columns * PANEL), allocate<bf16>(groups * PANEL),
                       allocate<bf16>(groups * PANEL)};
#pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; p++) {
            if (is_bf16) quantize_panel(kind, (const bf16*)weight, n, k, p, panel, packed, scales);
            else quantize_panel(kind, (const float*)weight, n, k, p, panel, packed, scales);
        }
        free(panel.x), free(panel.codes), free(panel.scales), free(panel.offsets);
    }
}
