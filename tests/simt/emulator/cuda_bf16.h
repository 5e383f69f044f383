#pragma once
#include "half_types.h"

SIMT_HALF_NAMES(__nv_bfloat16, __nv_bfloat162, bfloat16, bfloat162, 8)
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;
inline nv_bfloat162 make_bfloat162(nv_bfloat16 x, nv_bfloat16 y) { return {x, y}; }
