// float16 and bfloat16 as CUDA names and rounds them; arithmetic rounds once, to nearest even.
#pragma once

#include "simt.h"

namespace simt {

// A 16-bit floating-point number with that many bits of exponent.
template <int EXPONENT>
struct Half {
  unsigned short __x;

  static constexpr int FRACTION = 15 - EXPONENT, BIAS = (1 << (EXPONENT - 1)) - 1;

  Half() = default;
  Half(float value) : __x(from(value)) {}
  Half(double value) : __x(from(value)) {}
  Half(int value) : __x(from(value)) {}
  Half(unsigned value) : __x(from(value)) {}
  Half(long value) : __x(from(static_cast<double>(value))) {}
  Half(unsigned long value) : __x(from(static_cast<double>(value))) {}
  Half(long long value) : __x(from(static_cast<double>(value))) {}
  Half(unsigned long long value) : __x(from(static_cast<double>(value))) {}
  Half(short value) : __x(from(value)) {}
  Half(bool value) : __x(from(value)) {}

  operator float() const {
    int exponent = __x >> FRACTION & ((1 << EXPONENT) - 1);
    unsigned fraction = __x & ((1u << FRACTION) - 1), sign = static_cast<unsigned>(__x >> 15) << 31;
    if (exponent == (1 << EXPONENT) - 1)
      return bits<float>(sign | 0x7f800000u | fraction << (23 - FRACTION));
    // The same exponent counts from another bias in a float, whose subnormals are exact here too.
    unsigned field = (__x & 0x7fffu) << (23 - FRACTION);
    float scaled = bits<float>(field) * bits<float>(static_cast<unsigned>(254 - BIAS) << 23);
    return sign ? -scaled : scaled;
  }

  Half& operator+=(Half other) { return *this = Half(float(*this) + float(other)); }
  Half& operator-=(Half other) { return *this = Half(float(*this) - float(other)); }
  Half& operator*=(Half other) { return *this = Half(float(*this) * float(other)); }
  Half& operator/=(Half other) { return *this = Half(float(*this) / float(other)); }

  // A double holds a float, an int and a product of two halves, so this rounds these once.
  static unsigned short from(double value) {
    unsigned sign = std::signbit(value) ? 0x8000u : 0;
    constexpr unsigned infinite = ((1u << EXPONENT) - 1) << FRACTION;
    double size = std::fabs(value);
    if (std::isnan(value)) return static_cast<unsigned short>(0x7fff);
    if (std::isinf(value)) return static_cast<unsigned short>(sign | infinite);
    if (size == 0) return static_cast<unsigned short>(sign);
    int exponent;
    std::frexp(size, &exponent);  // size is in [0.5, 1) times 2 ** exponent
    exponent = exponent - 1 < 1 - BIAS ? 1 - BIAS : exponent - 1;
    double steps = std::nearbyint(std::ldexp(size, FRACTION - exponent));
    auto whole = static_cast<unsigned>(steps) +
                 (static_cast<unsigned>(exponent + BIAS - 1) << FRACTION);
    return static_cast<unsigned short>(sign | (whole > infinite ? infinite : whole));
  }
};

template <int E>
struct alignas(4) Half2 {
  Half<E> x, y;
  Half2() = default;
  Half2(Half<E> x, Half<E> y) : x(x), y(y) {}
};

#define SIMT_HALF_OPERATOR(sign)                                                        \
  template <int E>                                                                      \
  Half<E> operator sign(Half<E> a, Half<E> b) {                                         \
    return Half<E>(float(a) sign float(b));                                             \
  }                                                                                     \
  template <int E>                                                                      \
  Half2<E> operator sign(Half2<E> a, Half2<E> b) {                                      \
    return {a.x sign b.x, a.y sign b.y};                                                \
  }
SIMT_HALF_OPERATOR(+)
SIMT_HALF_OPERATOR(-)
SIMT_HALF_OPERATOR(*)
SIMT_HALF_OPERATOR(/)
#define SIMT_HALF_COMPARISON(sign, name)     \
  template <int E>                           \
  bool operator sign(Half<E> a, Half<E> b) { \
    return float(a) sign float(b);           \
  }                                          \
  template <int E>                           \
  bool name(Half<E> a, Half<E> b) {          \
    return float(a) sign float(b);           \
  }
SIMT_HALF_COMPARISON(<, __hlt)
SIMT_HALF_COMPARISON(>, __hgt)
SIMT_HALF_COMPARISON(<=, __hle)
SIMT_HALF_COMPARISON(>=, __hge)
SIMT_HALF_COMPARISON(==, __heq)
SIMT_HALF_COMPARISON(!=, __hne)
template <int E>
Half<E> operator-(Half<E> a) {
  a.__x ^= 0x8000;
  return a;
}

#define SIMT_HALF_BINARY(name, expression)      \
  template <int E>                              \
  Half<E> name(Half<E> a, Half<E> b) {          \
    return expression;                          \
  }                                             \
  template <int E>                              \
  Half2<E> name##2(Half2<E> a, Half2<E> b) {    \
    return {name(a.x, b.x), name(a.y, b.y)};    \
  }
SIMT_HALF_BINARY(__hadd, a + b)
SIMT_HALF_BINARY(__hsub, a - b)
SIMT_HALF_BINARY(__hmul, a * b)
SIMT_HALF_BINARY(__hdiv, a / b)
SIMT_HALF_BINARY(__hmax, Half<E>(std::fmax(float(a), float(b))))
SIMT_HALF_BINARY(__hmin, Half<E>(std::fmin(float(a), float(b))))
template <int E>
Half<E> __hfma(Half<E> a, Half<E> b, Half<E> c) {
  return Half<E>(static_cast<double>(a) * static_cast<double>(b) + static_cast<double>(c));
}
template <int E>
Half2<E> __hfma2(Half2<E> a, Half2<E> b, Half2<E> c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
template <int E>
bool __hisnan(Half<E> a) {
  return std::isnan(float(a));
}

#define SIMT_HALF_UNARY(name, expression) \
  template <int E>                        \
  Half<E> name(Half<E> a) {               \
    float x = a;                          \
    return Half<E>(expression);           \
  }
SIMT_HALF_UNARY(__habs, std::fabs(x))
SIMT_HALF_UNARY(__hneg, -x)
SIMT_HALF_UNARY(hexp, std::exp(x))
SIMT_HALF_UNARY(hexp2, std::exp2(x))
SIMT_HALF_UNARY(hlog, std::log(x))
SIMT_HALF_UNARY(hlog2, std::log2(x))
SIMT_HALF_UNARY(hsin, std::sin(x))
SIMT_HALF_UNARY(hcos, std::cos(x))
SIMT_HALF_UNARY(hsqrt, std::sqrt(x))
SIMT_HALF_UNARY(hrsqrt, 1 / std::sqrt(x))
SIMT_HALF_UNARY(hrcp, 1 / x)
SIMT_HALF_UNARY(hfloor, std::floor(x))
SIMT_HALF_UNARY(hceil, std::ceil(x))
SIMT_HALF_UNARY(htrunc, std::trunc(x))
SIMT_HALF_UNARY(hrint, std::nearbyint(x))

}  // namespace simt

// The names that both headers give, each with its type's own.
#define SIMT_HALF_NAMES(HALF, HALF2, half, half2, EXPONENT)                                    \
  using HALF = simt::Half<EXPONENT>;                                                           \
  using HALF2 = simt::Half2<EXPONENT>;                                                         \
  inline HALF __float2##half(float x) { return HALF(x); }                                      \
  inline HALF __float2##half##_rn(float x) { return HALF(x); }                                 \
  inline HALF __double2##half(double x) { return HALF(x); }                                    \
  inline HALF __int2##half##_rn(int x) { return HALF(x); }                                     \
  inline float __##half##2float(HALF x) { return float(x); }                                   \
  inline float2 __##half2##2float2(HALF2 v) { return {float(v.x), float(v.y)}; }               \
  inline HALF2 __float22##half2##_rn(float2 v) { return {HALF(v.x), HALF(v.y)}; }              \
  inline HALF2 __floats2##half2##_rn(float x, float y) { return {HALF(x), HALF(y)}; }          \
  inline HALF2 __float2##half2##_rn(float x) { return {HALF(x), HALF(x)}; }                    \
  inline HALF2 __##half##2##half2(HALF x) { return {x, x}; }                                   \
  inline HALF2 __halves2##half2(HALF x, HALF y) { return {x, y}; }                             \
  inline HALF __low2##half(HALF2 v) { return v.x; }                                            \
  inline HALF __high2##half(HALF2 v) { return v.y; }                                           \
  inline float __low2float(HALF2 v) { return float(v.x); }                                     \
  inline float __high2float(HALF2 v) { return float(v.y); }                                    \
  inline unsigned short __##half##_as_ushort(HALF x) { return x.__x; }                         \
  inline HALF __ushort_as_##half(unsigned short x) { return simt::bits<HALF>(x); }
