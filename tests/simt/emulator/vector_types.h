// The built-in vector types, as aligned as CUDA's.
#pragma once

#include <cstdint>

#define SIMT_VECTOR_1(name, type) \
  struct name##1 {                \
    type x;                       \
  };                              \
  inline name##1 make_##name##1(type x) { return {x}; }
#define SIMT_VECTOR_2(name, type)        \
  struct alignas(2 * sizeof(type)) name##2 { \
    type x, y;                           \
  };                                     \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }
#define SIMT_VECTOR_3(name, type) \
  struct name##3 {                \
    type x, y, z;                 \
  };                              \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }
#define SIMT_VECTOR_4(name, type)                                            \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 {    \
    type x, y, z, w;                                                         \
  };                                                                         \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
#define SIMT_VECTORS(name, type) \
  SIMT_VECTOR_1(name, type)      \
  SIMT_VECTOR_2(name, type)      \
  SIMT_VECTOR_3(name, type)      \
  SIMT_VECTOR_4(name, type)

SIMT_VECTORS(char, signed char)
SIMT_VECTORS(uchar, unsigned char)
SIMT_VECTORS(short, short)
SIMT_VECTORS(ushort, unsigned short)
SIMT_VECTORS(int, int)
SIMT_VECTOR_1(uint, unsigned)
SIMT_VECTOR_2(uint, unsigned)
SIMT_VECTOR_4(uint, unsigned)
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
SIMT_VECTORS(long, long)
SIMT_VECTORS(ulong, unsigned long)
SIMT_VECTORS(longlong, long long)
SIMT_VECTORS(ulonglong, unsigned long long)
SIMT_VECTORS(float, float)
SIMT_VECTORS(double, double)
