// What a CUDA source sees in place of the compiler's own names. Included before its first line.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "interface.h"
#include "vector_types.h"

#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define CUDA_VERSION 13000
#define __CUDA_ARCH__ 900

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// Promises that let a compiler keep in a register what another thread writes.
#define __restrict__
#define __restrict
#define __builtin_assume(...)
#define __nv_pure__

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_dim())
#define gridDim (simt::grid_dim())
constexpr int warpSize = 32;

namespace simt {

// How a kernel's parameters are taken from a request.
template <class T>
constexpr char parameter_kind = std::is_pointer_v<T>          ? 'p'
                                : std::is_same_v<T, float>    ? 'f'
                                : std::is_same_v<T, double>   ? 'd'
                                : !std::is_integral_v<T>      ? '?'
                                                              : "?bh?i???l"[sizeof(T)];

template <class T>
__attribute__((no_sanitize("thread"), always_inline)) inline T take(const Value& value) {
  if constexpr (std::is_pointer_v<T>)
    return static_cast<T>(value.address);
  else if constexpr (std::is_integral_v<T>)
    return static_cast<T>(value.whole);
  else
    return static_cast<T>(value.fraction);
}

template <class... A, size_t... I>
__attribute__((no_sanitize("thread"))) void call(void (*function)(A...), const Value* args,
                                                 std::index_sequence<I...>) {
  function(take<A>(args[I])...);
}

template <class... A>
__attribute__((no_sanitize("thread"))) void invoke(void (*function)(), const Value* args) {
  call(reinterpret_cast<void (*)(A...)>(function), args, std::index_sequence_for<A...>());
}

template <class... A>
Kernel kernel(const char* name, unsigned max_threads, void (*function)(A...)) {
  static const char kinds[] = {parameter_kind<A>..., 0};
  return {name,           max_threads, sizeof...(A),
          kinds,          &invoke<A...>, reinterpret_cast<void (*)()>(function),
          nullptr};
}

template <class T>
T& shared(int id, const char* name, size_t alignment) {
  using Element = std::remove_all_extents_t<T>;
  size_t least = alignment > alignof(Element) ? alignment : alignof(Element);
  return *static_cast<T*>(shared_memory(id, name, sizeof(T), sizeof(Element), least));
}

template <class T>
T* dynamic_shared(const char* name, size_t alignment) {
  return static_cast<T*>(shared_memory(0, name, 0, sizeof(T), alignment > 16 ? alignment : 16));
}

}  // namespace simt

#define SIMT_KERNEL(function, max_threads)                                                   \
  static simt::Kernel simt_##function = simt::kernel(#function, max_threads, &function);     \
  static bool simt_has_##function = (simt::register_kernel(&simt_##function), true);

#include "intrinsics.h"
#include "math_functions.h"
