// The kinds of quantized weight, and the levels of 4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314).
#pragma once

enum { INT8 = 0, INT4 = 1, NF4_KIND = 2 };

static const float NF4_LEVELS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

// The levels in 32nds, plus 32: four products with a signed byte fit 16 bits. Rounding them adds about 1 % to the error
// of quantizing to 16 levels.
static const uint8_t NF4[16] = {0, 10, 15, 19, 23, 26, 29, 32, 35, 37, 40, 43, 46, 50, 55, 64};
