/* The memory limits: dst = a, and dst = a + b, with plain and with non-temporal stores.

   Each thread takes one contiguous share. A plain store reads the line it writes from memory first;
   a non-temporal one does not, and that is the least traffic there can be. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { BLOCK = 2048, LINE = 64 };

/* 1 where the streams below bypass the cache. */
int floor_streams(void) {
#if defined(__x86_64__)
  return 1;
#else
  return 0;
#endif
}

/* One line of 64 bytes, to a multiple of 64. Stores of 16 bytes: a wider load of a line that was
   just written in parts would wait for it to leave the store buffer. */
static inline void stream_line(char *dst, const char *src) {
#if defined(__x86_64__)
  for (int at = 0; at < LINE; at += 16)
    _mm_stream_ps((float *)(dst + at), _mm_loadu_ps((const float *)(src + at)));
#else
  memcpy(dst, src, LINE);
#endif
}

/* How many of `bytes` lie before the first whole line. */
static size_t head_of(const char *dst, size_t bytes) {
  size_t head = (size_t)(-(intptr_t)dst & (LINE - 1));
  return head < bytes ? head : bytes;
}

static void fence(void) {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

/* The share of thread `place` of `count`: [first, last), cut at whole pages' worth of bytes. */
static void share(size_t bytes, int place, int count, size_t *first, size_t *last) {
  size_t step = (bytes / (size_t)count + 4095) / 4096 * 4096;
  *first = step * (size_t)place < bytes ? step * (size_t)place : bytes;
  *last = *first + step < bytes && place + 1 < count ? *first + step : bytes;
}

void floor_copy(char *dst, const char *a, size_t bytes, int streamed, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int place = 0; place < threads; ++place) {
    size_t first, last;
    share(bytes, place, threads, &first, &last);
    if (streamed) {
      size_t at = first + head_of(dst + first, last - first);
      memcpy(dst + first, a + first, at - first);
      for (; at + LINE <= last; at += LINE) stream_line(dst + at, a + at);
      memcpy(dst + at, a + at, last - at);
      fence();
    } else {
      /* Not one memcpy: it would choose non-temporal stores by itself. */
      for (size_t at = first; at < last; at += BLOCK)
        memcpy(dst + at, a + at, last - at < BLOCK ? last - at : BLOCK);
    }
  }
}

/* Arrays lie at multiples of their element, so that a head and a tail are whole elements. Each type
   has eight_TYPE, which adds eight elements, and sum_TYPE, which adds one. */
#define ADD(name, type)                                                                        \
  static void span_##name(char *dst, const char *a, const char *b, size_t bytes) {             \
    const type *p = (const type *)a, *q = (const type *)b;                                     \
    type *out = (type *)dst;                                                                   \
    size_t i = 0, count = bytes / sizeof(type);                                                \
    for (; i + 8 <= count; i += 8) eight_##name(out + i, p + i, q + i);                        \
    for (; i < count; ++i) out[i] = sum_##name(p[i], q[i]);                                    \
  }                                                                                            \
  void floor_add_##name(char *dst, const char *a, const char *b, size_t bytes, int streamed,   \
                        int threads) {                                                         \
    _Pragma("omp parallel for num_threads(threads) schedule(static, 1)")                       \
    for (int place = 0; place < threads; ++place) {                                            \
      size_t first, last;                                                                      \
      share(bytes, place, threads, &first, &last);                                             \
      size_t at = streamed ? first + head_of(dst + first, last - first) : last;                \
      span_##name(dst + first, a + first, b + first, at - first);                              \
      for (; at + LINE <= last; at += LINE) {                                                  \
        const type *p = (const type *)(a + at), *q = (const type *)(b + at);                   \
        _Alignas(LINE) type line[LINE / sizeof(type)];                                         \
        for (size_t i = 0; i < LINE / sizeof(type); i += 8)                                    \
          eight_##name(line + i, p + i, q + i);                                                \
        stream_line(dst + at, (const char *)line);                                             \
      }                                                                                        \
      span_##name(dst + at, a + at, b + at, last - at);                                        \
      if (streamed) fence();                                                                   \
    }                                                                                          \
  }

#define EIGHT(name, type)                                                                      \
  static inline void eight_##name(type *out, const type *p, const type *q) {                   \
    for (int i = 0; i < 8; ++i) out[i] = sum_##name(p[i], q[i]);                               \
  }

static inline float sum_float32(float p, float q) { return p + q; }
EIGHT(float32, float)
ADD(float32, float)

static inline double sum_float64(double p, double q) { return p + q; }
EIGHT(float64, double)
ADD(float64, double)

/* bfloat16 is the upper half of a float32; rounded to the nearest, ties to even. */
static inline uint16_t sum_bfloat16(uint16_t p, uint16_t q) {
  uint32_t u = (uint32_t)p << 16, v = (uint32_t)q << 16;
  float a, b;
  memcpy(&a, &u, 4);
  memcpy(&b, &v, 4);
  a += b;
  memcpy(&u, &a, 4);
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
EIGHT(bfloat16, uint16_t)
ADD(bfloat16, uint16_t)

#if defined(__F16C__)
static inline void eight_float16(uint16_t *out, const uint16_t *p, const uint16_t *q) {
  __m256 a = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
  __m256 b = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)q));
  _mm_storeu_si128((__m128i *)out, _mm256_cvtps_ph(_mm256_add_ps(a, b), 0));
}
static inline uint16_t sum_float16(uint16_t p, uint16_t q) {
  return _cvtss_sh(_cvtsh_ss(p) + _cvtsh_ss(q), 0);
}
ADD(float16, uint16_t)
#elif defined(__aarch64__)
static inline __fp16 sum_float16(__fp16 p, __fp16 q) { return p + q; }
EIGHT(float16, __fp16)
ADD(float16, __fp16)
#endif
