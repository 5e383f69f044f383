/* Enough of CUDA for a C++ compiler to run kernels without barriers, thread after thread. */
#include <cmath>
#include <cstdint>
#include <cstring>
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static
struct place {
  unsigned x, y, z;
};
static thread_local place blockIdx, threadIdx;
static inline float max(float a, float b) { return std::fmax(a, b); }
static inline int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
