// Groups of threads: a block, its tiles, a cluster and a grid.
#pragma once
#include "simt.h"

namespace cooperative_groups {

struct thread_block {
  void sync(SIMT_LINE) const { simt::block_barrier(0, line); }
  unsigned size() const {
    uint3 size = simt::block_dim();
    return size.x * size.y * size.z;
  }
  unsigned num_threads() const { return size(); }
  unsigned thread_rank() const {
    uint3 at = simt::thread_index(), size = simt::block_dim();
    return (at.z * size.y + at.y) * size.x + at.x;
  }
  dim3 group_index() const { return simt::block_index(); }
  dim3 thread_index() const { return simt::thread_index(); }
};
inline thread_block this_thread_block() { return {}; }

struct grid_group {
  void sync(SIMT_LINE) const { simt::grid_barrier(line); }
  bool is_valid() const { return true; }
  unsigned long long size() const { return num_blocks() * this_thread_block().size(); }
  unsigned long long num_blocks() const {
    uint3 size = simt::grid_dim();
    return 1ull * size.x * size.y * size.z;
  }
  unsigned long long block_rank() const {
    uint3 at = simt::block_index(), size = simt::grid_dim();
    return (1ull * at.z * size.y + at.y) * size.x + at.x;
  }
  unsigned long long thread_rank() const {
    return block_rank() * this_thread_block().size() + this_thread_block().thread_rank();
  }
};
inline grid_group this_grid() { return {}; }

struct cluster_group {
  static void sync(SIMT_LINE) {
    simt::cluster_arrive(line);
    simt::cluster_wait(line);
  }
  static void barrier_arrive(SIMT_LINE) { simt::cluster_arrive(line); }
  static void barrier_wait(SIMT_LINE) { simt::cluster_wait(line); }
  static unsigned block_rank() { return simt::cluster_rank(); }
  static unsigned num_blocks() {
    uint3 size = simt::cluster_dim();
    return size.x * size.y * size.z;
  }
  static unsigned thread_rank() {
    return block_rank() * this_thread_block().size() + this_thread_block().thread_rank();
  }
  static dim3 dim_blocks() { return simt::cluster_dim(); }
  template <class T>
  static T* map_shared_rank(T* address, int rank, SIMT_LINE) {
    return static_cast<T*>(
        simt::map_shared(const_cast<void*>(static_cast<const volatile void*>(address)),
                         static_cast<unsigned>(rank), line));
  }
  static unsigned query_shared_rank(const void* address) { return simt::shared_rank(address); }
};
inline cluster_group this_cluster() { return {}; }

// Neighbouring lanes of a warp; a mask of their own, so that tiles do not wait for each other.
template <unsigned SIZE>
struct thread_block_tile {
  static_assert(SIZE <= 32 && (SIZE & (SIZE - 1)) == 0);
  unsigned thread_rank() const { return simt::lane_index() % SIZE; }
  unsigned meta_group_rank() const { return this_thread_block().thread_rank() / SIZE; }
  unsigned meta_group_size() const { return (this_thread_block().size() + SIZE - 1) / SIZE; }
  static constexpr unsigned size() { return SIZE; }
  static constexpr unsigned num_threads() { return SIZE; }
  unsigned mask() const {
    return (0xffffffffu >> (32 - SIZE)) << (simt::lane_index() / SIZE * SIZE);
  }
  void sync(SIMT_LINE) const { __syncwarp(mask(), line); }
  template <class T>
  T shfl(T value, int lane, SIMT_LINE) const {
    return __shfl_sync(mask(), value, lane, SIZE, line);
  }
  template <class T>
  T shfl_down(T value, unsigned delta, SIMT_LINE) const {
    return __shfl_down_sync(mask(), value, delta, SIZE, line);
  }
  template <class T>
  T shfl_up(T value, unsigned delta, SIMT_LINE) const {
    return __shfl_up_sync(mask(), value, delta, SIZE, line);
  }
  template <class T>
  T shfl_xor(T value, int lanes, SIMT_LINE) const {
    return __shfl_xor_sync(mask(), value, lanes, SIZE, line);
  }
};
template <unsigned SIZE>
thread_block_tile<SIZE> tiled_partition(const thread_block&) {
  return {};
}

template <class Group>
void sync(const Group& group, SIMT_LINE) {
  group.sync(line);
}

}  // namespace cooperative_groups
