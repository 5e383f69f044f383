// Barriers, warp-wide calls, atomics, and loads and stores with cache hints.
#pragma once

#define SIMT_LINE int line = __builtin_LINE()

inline void __syncthreads(SIMT_LINE) { simt::block_barrier(0, line); }
inline int __syncthreads_count(int vote, SIMT_LINE) { return simt::block_barrier(vote, line); }
inline int __syncthreads_or(int vote, SIMT_LINE) { return simt::block_barrier(vote, line) != 0; }
inline int __syncthreads_and(int vote, SIMT_LINE) { return !simt::block_barrier(!vote, line); }
inline void __threadfence() { simt::fence(); }
inline void __threadfence_block() {}
inline void __threadfence_system() { simt::fence(); }

namespace simt {

template <class T>
T exchange(WarpOp op, unsigned mask, T value, int argument, int width, int line) {
  static_assert(sizeof(T) <= 16);
  WarpCall call = {op, mask, argument, width, {}, {}};
  std::memcpy(call.value, &value, sizeof value);
  warp_call(call, line);
  std::memcpy(&value, call.result, sizeof value);
  return value;
}

inline unsigned vote(unsigned mask, bool value, int line) {
  WarpCall call = {WarpOp::ballot, mask, 0, 32, {value, 0}, {}};
  warp_call(call, line);
  return static_cast<unsigned>(call.result[0]);
}

}  // namespace simt

inline void __syncwarp(unsigned mask = 0xffffffff, SIMT_LINE) {
  simt::WarpCall call = {simt::WarpOp::sync, mask, 0, 32, {}, {}};
  simt::warp_call(call, line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SIMT_LINE) {
  return simt::exchange(simt::WarpOp::shuffle, mask, value, lane, width, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_LINE) {
  return simt::exchange(simt::WarpOp::up, mask, value, static_cast<int>(delta), width, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_LINE) {
  return simt::exchange(simt::WarpOp::down, mask, value, static_cast<int>(delta), width, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SIMT_LINE) {
  return simt::exchange(simt::WarpOp::exclusive_or, mask, value, lanes, width, line);
}
inline unsigned __ballot_sync(unsigned mask, int value, SIMT_LINE) {
  return simt::vote(mask, value, line);
}
inline int __any_sync(unsigned mask, int value, SIMT_LINE) {
  return simt::vote(mask, value, line) != 0;
}
inline int __all_sync(unsigned mask, int value, SIMT_LINE) {
  return simt::vote(mask, !value, line) == 0;
}
inline unsigned __activemask(SIMT_LINE) { return simt::active_mask(line); }

// A kernel that adds with atomics gives other last bits from run to run.
#define SIMT_ATOMIC(name, operation)                                     \
  template <class T, class U>                                            \
  T name(T* address, U value, SIMT_LINE) {                               \
    simt::atomic_used(#name, line);                                      \
    T old = *address, with = static_cast<T>(value);                      \
    *address = operation;                                                \
    return old;                                                          \
  }
SIMT_ATOMIC(atomicAdd, old + with)
SIMT_ATOMIC(atomicSub, old - with)
SIMT_ATOMIC(atomicExch, with)
SIMT_ATOMIC(atomicMin, old < with ? old : with)
SIMT_ATOMIC(atomicMax, old > with ? old : with)
SIMT_ATOMIC(atomicAnd, old & with)
SIMT_ATOMIC(atomicOr, old | with)
SIMT_ATOMIC(atomicXor, old ^ with)
SIMT_ATOMIC(atomicInc, old >= with ? T(0) : old + T(1))
template <class T>
T atomicCAS(T* address, T expected, T value, SIMT_LINE) {
  simt::atomic_used("atomicCAS", line);
  T old = *address;
  if (old == expected) *address = value;
  return old;
}

#define SIMT_LOAD(name)       \
  template <class T>          \
  T name(const T* address) {  \
    return *address;          \
  }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldcs)
SIMT_LOAD(__ldlu)
SIMT_LOAD(__ldcv)
#define SIMT_STORE(name)               \
  template <class T>                   \
  void name(T* address, T value) {     \
    *address = value;                  \
  }
SIMT_STORE(__stcg)
SIMT_STORE(__stcs)
SIMT_STORE(__stwb)
SIMT_STORE(__stwt)

inline void __trap(SIMT_LINE) { simt::trap("__trap", line); }
inline void __nanosleep(unsigned) {}
inline long long clock64() { return 0; }
inline size_t __cvta_generic_to_shared(const void* address) {
  return reinterpret_cast<size_t>(address);
}
