// Runs a launch: blocks in an order of chance, their threads switched at every barrier.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "engine.h"

namespace simt {

Launch* launch = nullptr;
std::mt19937 randomness;

namespace {

std::vector<Thread*> ready;
std::vector<Thread*> polling;  // until some word is written
std::vector<Thread*> delayed;  // until no other thread can go on
uint64_t words_written = 0;
bool abandoned = false;
uint32_t epoch = 0;  // of the grid, over all launches
std::vector<std::unique_ptr<Thread>> pool;
constexpr size_t STATIC_SHARED = 48 * 1024, ALL_SHARED = 227 * 1024;

unsigned volume(const dim3& size) { return size.x * size.y * size.z; }

uint3 position(unsigned index, const dim3& size) {
  return {index % size.x, index / size.x % size.y, index / size.x / size.y};
}

unsigned pick(unsigned count) { return static_cast<unsigned>(randomness() % count); }

// A barrier of a block (or of a group) opens when all who are still there have arrived.
void open_block(Block& block) {
  Barrier& barrier = block.barrier;
  if (!barrier.arrived || barrier.arrived + barrier.exited < barrier.members) return;
  const Thread* first = nullptr;
  for (Thread* thread : block.threads) {
    if (thread->wait == Wait::block && !first) first = thread;
    if (thread->wait == Wait::block && thread->line != first->line)
      report("divergent-barrier", format("block line %d", first->line),
             format("__syncthreads: thread %u waits at line %d, thread %u at line %d", first->index,
                    first->line, thread->index, thread->line),
             thread->line);
  }
  if (barrier.exited)
    report("missing-arrival", "block",
           format("__syncthreads: %u threads wait, %u have left the kernel", barrier.arrived,
                  barrier.exited),
           first->line);
  barrier.arrived = 0;
  ++barrier.epoch;
  block.vote_result = block.votes;
  block.votes = 0;
  for (Thread* thread : block.threads)
    if (thread->wait == Wait::block) make_ready(*thread);
}

void open_group(Group& group) {
  Barrier& barrier = group.barrier;
  if (!barrier.arrived || barrier.arrived + barrier.exited < barrier.members) return;
  if (barrier.exited)
    report("missing-arrival", "group",
           format("barrier of several blocks: %u threads have left the kernel", barrier.exited), 0);
  barrier.arrived = 0;
  ++barrier.epoch;
  for (Block& block : group.blocks)
    for (Thread* thread : block.threads)
      if (thread->wait == Wait::cluster || thread->wait == Wait::grid) make_ready(*thread);
}

void leave(Thread& thread) {
  thread.wait = Wait::exited;
  --thread.warp->running;
  ++thread.block->barrier.exited;
  ++thread.block->group->barrier.exited;
  warp_settle(*thread.warp, thread);
  open_block(*thread.block);
  open_group(*thread.block->group);
}

void thread_main() {
  launch->kernel->invoke(launch->kernel->function, launch->args.data());
  leave(*current);
}

const char* place(Wait wait) {
  switch (wait) {
    case Wait::block: return "__syncthreads";
    case Wait::cluster: return "a cluster barrier";
    case Wait::grid: return "a grid barrier";
    case Wait::warp: return "a warp-wide call";
    case Wait::active_mask: return "__activemask";
    case Wait::word: return "a word that no resident thread will write";
    default: return "nothing";
  }
}

// No thread can go on: say where the first one of each place waits.
void report_deadlock(Group& group) {
  std::vector<const Thread*> seen;
  std::string text;
  unsigned exited = 0;
  for (Block& block : group.blocks)
    for (Thread* thread : block.threads) {
      exited += thread->wait == Wait::exited;
      bool known = thread->wait == Wait::exited;
      for (const Thread* other : seen)
        known |= other->wait == thread->wait && other->line == thread->line;
      if (known) continue;
      seen.push_back(thread);
      text += format("%sthread %u of block %u waits at %s (line %d)", text.empty() ? "" : "; ",
                     thread->index, block.index, place(thread->wait), thread->line);
    }
  if (exited) text += format("; %u threads have left the kernel", exited);
  report("deadlock", "threads", text, seen.empty() ? 0 : seen[0]->line);
}

void set_up(Group& group, const std::vector<unsigned>& indices) {
  unsigned threads = volume(launch->block);
  group.blocks.resize(indices.size());
  group.barrier = Barrier();
  group.barrier.members = threads * static_cast<unsigned>(indices.size());
  while (pool.size() < group.barrier.members) pool.push_back(std::make_unique<Thread>());
  for (unsigned rank = 0; rank < indices.size(); ++rank) {
    Block& block = group.blocks[rank];
    block.index = indices[rank];
    block.rank = rank;
    block.group = &group;
    block.barrier.members = threads;
    block.warps.resize((threads + WARP - 1) / WARP);
    for (unsigned index = 0; index < threads; ++index) {
      Thread& thread = *pool[rank * threads + index];
      thread.indices = {position(index, launch->block), position(block.index, launch->grid),
                        launch->block,                  launch->grid,
                        launch->cluster,                {}};
      thread.block = &block;
      thread.warp = &block.warps[index / WARP];
      thread.lane = index % WARP;
      thread.index = index;
      std::fill(std::begin(thread.known), std::end(thread.known), 0);
      thread.known[thread.lane] = 1;
      thread.cluster_arrived = thread.cluster_passed = 0;
      thread.polled = 0;
      thread.wait = Wait::none;
      thread.warp->block = &block;
      thread.warp->lanes[thread.lane] = &thread;
      block.threads.push_back(&thread);
      prepare(thread, thread_main);
      make_ready(thread);
    }
  }
}

void run_group(const std::vector<unsigned>& indices) {
  Group group;
  size_t mark = arena_mark();
  set_up(group, indices);
  while (!abandoned) {
    show_by_chance();
    if (ready.empty()) ready.swap(delayed);
    if (ready.empty() && !show_one()) break;
    if (ready.empty()) continue;
    unsigned at = pick(static_cast<unsigned>(ready.size()));
    Thread* thread = ready[at];
    ready[at] = ready.back();
    ready.pop_back();
    resume(*thread);
  }
  if (group.barrier.exited < group.barrier.members) {
    if (!abandoned) report_deadlock(group);
    abandoned = true;
    ready.clear();
    polling.clear();
    delayed.clear();
    forget_stores();
    for (auto& thread : pool) reset(*thread);
    arena_release(mark);
    return;
  }
  if (launch->cooperative) epoch += group.barrier.epoch;
  for (Block& block : group.blocks) {
    size_t fixed = block.shared_bytes;
    if (fixed > STATIC_SHARED || fixed + launch->dynamic_shared > ALL_SHARED)
      report("launch", "shared",
             format("%zu bytes of static and %zu of dynamic shared memory; at most %zu static, %zu "
                    "in all",
                    fixed, launch->dynamic_shared, STATIC_SHARED, ALL_SHARED),
             0);
  }
  arena_release(mark);
}

// The blocks that are resident together, in an order of chance.
std::vector<std::vector<unsigned>> groups() {
  unsigned blocks = volume(launch->grid);
  std::vector<std::vector<unsigned>> made;
  if (launch->cooperative) {
    made.emplace_back();
    for (unsigned i = 0; i < blocks; ++i) made[0].push_back(i);
    return made;
  }
  const dim3 &grid = launch->grid, &size = launch->cluster;
  for (unsigned z = 0; z < grid.z; z += size.z)
    for (unsigned y = 0; y < grid.y; y += size.y)
      for (unsigned x = 0; x < grid.x; x += size.x) {
        made.emplace_back();
        for (unsigned rank = 0; rank < volume(size); ++rank) {
          uint3 at = position(rank, size);
          made.back().push_back(((z + at.z) * grid.y + y + at.y) * grid.x + x + at.x);
        }
      }
  std::shuffle(made.begin(), made.end(), randomness);
  return made;
}

}  // namespace

unsigned threads_per_block() { return launch ? volume(launch->block) : 1; }

void make_ready(Thread& thread) {
  thread.wait = Wait::none;
  ++thread.warp->running;
  ready.push_back(&thread);
}

// The current thread stops here until something makes it ready again.
void block_on(Wait wait, int line) {
  current->wait = wait;
  current->line = line;
  --current->warp->running;
  warp_settle(*current->warp, *current);
}

// A thread that reads a word again goes on when one has been written since. At other times it may be
// that all others go on before it, as far as they come.
void poll(uintptr_t address) {
  bool again = current->polled == address && current->polled_at == words_written;
  current->polled = address;
  if (again) {
    block_on(Wait::word, 0);
    polling.push_back(current);
    suspend();
  } else if (pick(2)) {
    delayed.push_back(current);
    suspend();
  }
  current->polled_at = words_written;
}

void word_written() {
  ++words_written;
  for (Thread* thread : polling) make_ready(*thread);
  polling.clear();
}

void abandon() {
  abandoned = true;
  if (current) suspend();
}

bool run(Launch& next) {
  launch = &next;
  launch->epoch = ++epoch;
  abandoned = false;
  const dim3 &grid = next.grid, &cluster = next.cluster;
  unsigned threads = volume(next.block), limit = next.kernel->max_threads;
  std::string wrong;
  if (!volume(grid) || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535)
    wrong = format("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
  else if (!threads || threads > 1024 || next.block.z > 64)
    wrong = format("blocks of %u threads", threads);
  else if (limit && threads > limit)
    wrong = format("blocks of %u threads, __launch_bounds__(%u)", threads, limit);
  else if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z || volume(cluster) > 16)
    wrong = format("clusters of %u blocks in a grid of %u", volume(cluster), volume(grid));
  else if (next.dynamic_shared > ALL_SHARED)
    wrong = format("%zu bytes of dynamic shared memory", next.dynamic_shared);
  if (!wrong.empty()) {
    report("launch", next.kernel->name, std::string(next.kernel->name) + ": " + wrong, 0);
    return false;
  }
  for (const auto& group : groups())
    if (!abandoned) run_group(group);
  return !abandoned;
}

// What kernels call ---------------------------------------------------------------------------

uint3 thread_index() { return current->indices.thread; }
uint3 block_index() { return current->indices.block; }
uint3 block_dim() { return current->indices.block_dim; }
uint3 grid_dim() { return current->indices.grid_dim; }
uint3 cluster_dim() { return current->indices.cluster_dim; }
unsigned cluster_rank() { return current->block->rank; }
unsigned lane_index() { return current->lane; }

int block_barrier(int vote, int line) {
  Block& block = *current->block;
  block.votes += vote != 0;
  ++block.barrier.arrived;
  block_on(Wait::block, line);
  open_block(block);
  suspend();
  return current->block->vote_result;
}

void cluster_arrive(int line) {
  fence();
  if (current->cluster_arrived != current->cluster_passed)
    report("divergent-barrier", "cluster", "two arrivals at a cluster barrier without a wait", line);
  ++current->cluster_arrived;
  ++current->block->group->barrier.arrived;
  open_group(*current->block->group);
}

void cluster_wait(int line) {
  if (current->block->group->barrier.epoch < current->cluster_arrived) {
    block_on(launch->cooperative ? Wait::grid : Wait::cluster, line);
    suspend();
  }
  current->cluster_passed = current->cluster_arrived;
}

void grid_barrier(int line) {
  if (!launch->cooperative) {
    report("launch", "grid", "a barrier of the grid in a launch that is not cooperative", line);
    abandon();
  }
  cluster_arrive(line);
  cluster_wait(line);
}

void atomic_used(const char* name, int line) {
  report("atomic", name, std::string(name) + ": the order of its additions is not defined", line);
}

void trap(const char* what, int line) {
  report("trap", what, what, line);
  abandon();
}


}  // namespace simt
