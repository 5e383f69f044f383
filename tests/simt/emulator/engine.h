// The emulator's own state: launches, blocks, warps, threads, memory. Kernels do not see this file.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "interface.h"

namespace simt {

constexpr unsigned WARP = 32;

// When a memory access happened, in the clocks of every barrier that could order it against others.
struct Access {
  uint32_t thread = 0;  // index in the grid + 1; 0: no access yet
  uint32_t block_epoch = 0;
  uint32_t warp_clock = 0;
  uint16_t cluster_epoch = 0;
  uint32_t grid_epoch = 0;
  bool shared_word = false;  // volatile: at any time, against others of its kind
};

// The last write and two of the reads since, for one element.
struct Cell {
  Access write, reads[2];
};

enum class Role { input, output, update, scratch, shared };

struct Block;

// One array: a kernel's argument or a shared array of one block.
struct Region {
  std::string name;
  Role role = Role::input;
  uintptr_t base = 0;
  size_t size = 0;
  unsigned granule = 1;  // bytes of a cell
  std::vector<Cell> cells;
  std::vector<uint8_t> written;
  Block* owner = nullptr;
  bool gone = false;  // given back
  unsigned waiting = 0;  // stores that are not to be seen yet
};

enum class Wait { none, exited, block, cluster, grid, warp, active_mask, word };

struct Warp;

struct Thread {
  jmp_buf context;
  char* stack = nullptr;
  bool started = false;
  Indices indices;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned lane = 0;
  uint32_t index = 0;          // in the block
  uint32_t known[WARP] = {};   // the warp clocks this thread has synchronised with
  uint16_t cluster_arrived = 0, cluster_passed = 0;
  Wait wait = Wait::none;
  int line = 0;
  uintptr_t polled = 0;        // the last volatile read, and how many volatile writes there had been
  uint64_t polled_at = 0;
  WarpCall call;               // while it waits at a warp-wide call
};

struct Warp {
  Block* block = nullptr;
  Thread* lanes[WARP] = {};
  unsigned running = 0;
};

// Threads that have arrived at a barrier; those that have left the kernel cannot.
struct Barrier {
  unsigned members = 0, arrived = 0, exited = 0;
  uint32_t epoch = 0;
};

struct Group;

struct Block {
  uint32_t index = 0;  // in the grid
  unsigned rank = 0;   // in the group
  Group* group = nullptr;
  Barrier barrier;
  int votes = 0;       // of __syncthreads_count and its kin
  int vote_result = 0;
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  std::vector<Region*> shared;  // by declaration
  size_t shared_bytes = 0;
};

// Blocks that are resident together: one, a cluster, or a cooperative grid.
struct Group {
  std::vector<Block> blocks;
  Barrier barrier;  // of the cluster or the grid
};

struct Launch {
  const Kernel* kernel = nullptr;
  dim3 grid, block, cluster;
  size_t dynamic_shared = 0;
  bool cooperative = false;
  std::vector<Value> args;
  uint32_t epoch = 0;  // at its start; a barrier of the grid adds one
};

extern Thread* current;
extern Launch* launch;
extern std::mt19937 randomness;

// findings.cpp
void report(const char* kind, const std::string& where, const std::string& text, int line,
            const void* pc = nullptr);
void write_findings(FILE* file);
void clear_findings();
std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
std::string thread_name(uint32_t thread_in_grid);

// memory.cpp
Region* allocate(const std::string& name, Role role, size_t size, unsigned granule,
                 unsigned misalignment);
size_t arena_mark();
void arena_release(size_t mark);
void arena_clear();
void give_back(Region& region);
Region* region_at(uintptr_t address);
void fill(Region& region, const void* data);
void access(uintptr_t address, size_t size, bool write, const void* pc);
void volatile_access(uintptr_t address, size_t size, bool write, const void* pc);
bool ordered(const Access& before, const Thread& now);
void check_outputs();
constexpr size_t STACK = 256 * 1024;

// stores.cpp
void store_begins(uintptr_t address, size_t size);  // a volatile one of the thread that runs
void store_ends();                                  // if one has begun: it is to be seen sometime
void show_to_block(uintptr_t address, size_t size);
void fence();
void show_by_chance();
bool show_one();  // false: no store waits
void forget_stores();

// programs.cpp
const Kernel* load_program(const char* path);
const Kernel* kernel_named(const Kernel* first, const char* name);

// fibers.cpp
void resume(Thread& thread);
void suspend();
void reset(Thread& thread);
void prepare(Thread& thread, void (*body)());

// schedule.cpp
bool run(Launch& launch);  // false: it was abandoned
void abandon();            // ends the run; the calling thread of a kernel does not come back
void make_ready(Thread& thread);
void block_on(Wait wait, int line);
void poll(uintptr_t address);  // before a volatile read
void word_written();           // after a volatile write
unsigned threads_per_block();

// warps.cpp
void warp_settle(Warp& warp, Thread& thread);

}  // namespace simt
