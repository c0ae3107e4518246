// AVX2 and FMA: sixteen lanes are two registers.
#pragma once

typedef float bf16_operand;   // what bf16 weights are multiplied with
typedef int16_t int8_operand;  // what 8-bit weights are multiplied with
constexpr int BF16_PANELS = 2, BF16_FEW_ROWS = 4, BF16_CHUNK = 1 << 14;
constexpr Tile BF16_FEW = {3, 2}, BF16_MANY = {6, 1};  // of many rows the reading of weights is shared, of few of rows
constexpr int INT8_ROWS = 2, INT4_ROWS = 4;

struct F16 { __m256 a, b; };
struct I16 { __m256i a, b; };

INLINE F16 zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, F16 v) { _mm256_storeu_ps(p, v.a), _mm256_storeu_ps(p + 8, v.b); }
INLINE F16 fma(F16 x, F16 y, F16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
INLINE F16 fma(F16 x, float y, F16 z) {
    __m256 v = _mm256_set1_ps(y);
    return {_mm256_fmadd_ps(x.a, v, z.a), _mm256_fmadd_ps(x.b, v, z.b)};
}
INLINE F16 scaled(F16 x, float y) {
    __m256 v = _mm256_set1_ps(y);
    return {_mm256_mul_ps(x.a, v), _mm256_mul_ps(x.b, v)};
}
INLINE F16 load(const bf16* p) {
    auto half = [](const bf16* q) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)q)), 16));
    };
    return {half(p), half(p + 8)};
}

INLINE I16 izeros() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE F16 to_float(I16 v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
INLINE I16 plus(I16 v, int32_t n) {
    __m256i w = _mm256_set1_epi32(n);
    return {_mm256_add_epi32(v.a, w), _mm256_add_epi32(v.b, w)};
}

// bf16: sixteen pairs of weights (k, k + 1), a pair per lane: first the even columns of a line, then the odd ones, so
// that fewer registers are in use at a time.
constexpr int LINE_PARTS = 2;
typedef F16 LinePart;
INLINE LinePart load_part(const bf16* p, int part) {
    __m256i a = _mm256_loadu_si256((const __m256i*)p), b = _mm256_loadu_si256((const __m256i*)(p + 16));
    if (part == 0) return {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
    const __m256i mask = _mm256_set1_epi32(0xffff0000);
    return {_mm256_castsi256_ps(_mm256_and_si256(a, mask)), _mm256_castsi256_ps(_mm256_and_si256(b, mask))};
}
INLINE F16 dot(F16 sum, LinePart w, const bf16_operand* x) { return fma(w, *x, sum); }

// 8 bits: sixteen quadruples of weights; exact sums of 16-bit products, two sums per lane until the end.
struct Bytes { __m256i part[4]; };
struct ByteSums { __m256i part[4]; };
INLINE ByteSums byte_zeros() {
    __m256i z = _mm256_setzero_si256();
    return {{z, z, z, z}};
}
INLINE Bytes load_bytes(const int8_t* p) {
    auto part = [](const int8_t* q) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)q)); };
    return {{part(p), part(p + 16), part(p + 32), part(p + 48)}};
}
INLINE ByteSums dot(ByteSums sums, Bytes w, const int8_operand* x) {
    long long four;
    memcpy(&four, x, 8);
    __m256i v = _mm256_set1_epi64x(four);
    for (int i = 0; i < 4; i++) sums.part[i] = _mm256_add_epi32(sums.part[i], _mm256_madd_epi16(w.part[i], v));
    return sums;
}
INLINE I16 total(ByteSums s, int32_t) {
    auto join = [](__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8); };
    return {join(s.part[0], s.part[1]), join(s.part[2], s.part[3])};
}

// 4 bits: sixteen times eight weights, as unsigned bytes: the codes themselves, or what `table` says of them.
// A product of unsigned and signed bytes is added in pairs to 16 bits; neither kind can overflow these: codes reach
// 15, four lines of them 16 * 15 * 127 = 30480; a table's entries reach 64, one line of them 4 * 64 * 127 = 32512.
struct Table { __m256i t; };
struct Nibbles { I16 low, high; };
struct NibbleSums { I16 wide, narrow; };
INLINE Table load_table(const uint8_t* p) {
    return {_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p))};
}
INLINE NibbleSums nibble_start(int32_t from) { return {plus(izeros(), from), izeros()}; }
template <bool TABLE>
INLINE Nibbles load_nibbles(const uint8_t* p, Table table) {
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i a = _mm256_loadu_si256((const __m256i*)p), b = _mm256_loadu_si256((const __m256i*)(p + 32));
    auto value = [&](__m256i v) {
        v = _mm256_and_si256(v, mask);
        return TABLE ? _mm256_shuffle_epi8(table.t, v) : v;
    };
    return {{value(a), value(b)}, {value(_mm256_srli_epi16(a, 4)), value(_mm256_srli_epi16(b, 4))}};
}
INLINE I16 widen_add(I16 sums, __m256i a, __m256i b) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(sums.a, _mm256_madd_epi16(a, ones)), _mm256_add_epi32(sums.b, _mm256_madd_epi16(b, ones))};
}
template <bool TABLE>
INLINE NibbleSums dot(NibbleSums s, Nibbles w, const int8_t* x) {
    int32_t first, second;
    memcpy(&first, x, 4), memcpy(&second, x + 4, 4);
    __m256i u = _mm256_set1_epi32(first), v = _mm256_set1_epi32(second);
    __m256i la = _mm256_maddubs_epi16(w.low.a, u), lb = _mm256_maddubs_epi16(w.low.b, u);
    __m256i ha = _mm256_maddubs_epi16(w.high.a, v), hb = _mm256_maddubs_epi16(w.high.b, v);
    I16 line = {_mm256_add_epi16(la, ha), _mm256_add_epi16(lb, hb)};
    if (TABLE) s.wide = widen_add(s.wide, line.a, line.b);
    else s.narrow = {_mm256_add_epi16(s.narrow.a, line.a), _mm256_add_epi16(s.narrow.b, line.b)};
    return s;
}
template <bool TABLE>
INLINE NibbleSums after_four_lines(NibbleSums s) {
    return TABLE ? s : NibbleSums{widen_add(s.wide, s.narrow.a, s.narrow.b), izeros()};
}
INLINE I16 total(NibbleSums s) { return s.wide; }
