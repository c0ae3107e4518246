// The kernels' dot products in the operations of AVX512, real or emulated.
#pragma once

INLINE int32_t word(const void* p) {
    int32_t bits;
    memcpy(&bits, p, 4);
    return bits;
}

constexpr int LINE_PARTS = 1;
struct LinePart { I16 pairs; };
INLINE LinePart load_part(const bf16* p, int) { return {load_line(p)}; }
INLINE F16 dot(F16 sum, LinePart w, const bf16_operand* x) { return dot_bf16(sum, w.pairs, word(x)); }

struct Bytes { I16 line; };
struct ByteSums { I16 sum; };
INLINE ByteSums byte_zeros() { return {izeros()}; }
INLINE Bytes load_bytes(const int8_t* p) { return {flip_signs(load_line(p))}; }  // w + 128
INLINE ByteSums dot(ByteSums s, Bytes w, const int8_operand* x) { return {dot_bytes(s.sum, w.line, word(x))}; }
INLINE I16 total(ByteSums s, int32_t sum_of_x) { return plus(s.sum, -128 * sum_of_x); }

struct Table { I16 t; };
struct Nibbles { I16 low, high; };
struct NibbleSums { I16 low, high; };  // neither waits for the other
INLINE Table load_table(const uint8_t* p) { return {load_table_of(p)}; }
INLINE NibbleSums nibble_start(int32_t from) { return {plus(izeros(), from), izeros()}; }
template <bool TABLE>
INLINE Nibbles load_nibbles(const uint8_t* p, Table table) {
    I16 line = load_line(p), low = low_nibbles(line), high = high_nibbles(line);
    if (!TABLE) return {low, high};
    return {look_up(table.t, low), look_up(table.t, high)};
}
template <bool TABLE>
INLINE NibbleSums dot(NibbleSums s, Nibbles w, const int8_t* x) {
    return {dot_bytes(s.low, w.low, word(x)), dot_bytes(s.high, w.high, word(x + 4))};
}
template <bool TABLE>
INLINE NibbleSums after_four_lines(NibbleSums s) { return s; }
INLINE I16 total(NibbleSums s) { return plus(s.low, s.high); }
