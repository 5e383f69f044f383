#pragma once
#include "half_types.h"

SIMT_HALF_NAMES(__half, __half2, half, half2, 5)
using half = __half;
using half2 = __half2;
inline half2 make_half2(half x, half y) { return {x, y}; }
inline half2 __lows2half2(half2 a, half2 b) { return {a.x, b.x}; }
