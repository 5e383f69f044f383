// What a kernel's translation unit and the emulator share.
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

namespace simt {

struct Indices {
  uint3 thread, block, block_dim, grid_dim, cluster_dim, rank_in_cluster;
};

// Constant for a thread's whole life, so the compiler may keep what they return.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) uint3 block_dim();
__attribute__((const)) uint3 grid_dim();

// An argument as the request gives it; the kernel's parameter says what it becomes.
struct Value {
  enum Kind { pointer, integer, real } kind;
  void* address;
  int64_t whole;
  double fraction;
};

struct Kernel {
  const char* name;
  unsigned max_threads;  // of __launch_bounds__, 0 where there is none
  unsigned parameters;
  const char* kinds;  // a letter a parameter: p pointer, b h i l integers of 1, 2, 4, 8 bytes, f, d
  void (*invoke)(void (*function)(), const Value* args);
  void (*function)();
  const Kernel* next;
};

// Called as a program is loaded, for each of its kernels.
void register_kernel(Kernel* kernel);

// Shared memory of the block that is running. `id` tells the declarations of a source apart; 0 is
// the dynamic memory, whose size the launch gives.
void* shared_memory(int id, const char* name, size_t size, size_t granule, size_t alignment);

enum class WarpOp { sync, shuffle, up, down, exclusive_or, ballot };

struct WarpCall {
  WarpOp op;
  unsigned mask;
  int lane_argument, width;
  uint64_t value[2];
  uint64_t result[2];
};

// A call that the lanes of `call.mask` make together.
void warp_call(WarpCall& call, int line);
unsigned active_mask(int line);
// A barrier of the block; gives how many threads voted non-zero.
int block_barrier(int vote, int line);
void cluster_arrive(int line);
void cluster_wait(int line);
void grid_barrier(int line);
// All that the block has stored so far is seen by all others before what the thread does next.
void fence();
void* map_shared(const void* address, unsigned rank, int line);
unsigned shared_rank(const void* address);
unsigned cluster_rank();
uint3 cluster_dim();
unsigned lane_index();
void atomic_used(const char* name, int line);
void trap(const char* what, int line);

}  // namespace simt
