// Arrays in one reserved range of addresses, and the check of every access a kernel makes.
//
// Each array has slots of its own, so that an address just outside an array is still known as that
// array's.

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <algorithm>
#include <cstring>
#include <memory>

#include "engine.h"

namespace simt {

namespace {

constexpr size_t SLOT = 1 << 20, MARGIN = SLOT / 4, SLOTS = 16 * 1024;

uintptr_t arena = 0;
size_t next_slot = 0;
Region* owners[SLOTS];
std::vector<std::unique_ptr<Region>> regions;

void reserve() {
  void* at = mmap(nullptr, SLOTS * SLOT, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) {
    perror("mmap");
    exit(3);
  }
  arena = (reinterpret_cast<uintptr_t>(at) + SLOT - 1) / SLOT * SLOT;
}

const char* verb(bool write) { return write ? "written" : "read"; }

std::string element(const Region& region, intptr_t offset) {
  std::string text = region.name + format("[%ld]", static_cast<long>(offset / region.granule));
  if (offset < 0 && offset % region.granule)
    text = region.name + format("[%ld]", static_cast<long>(offset / region.granule) - 1);
  return region.owner ? text + format(" of block %u", region.owner->index) : text;
}

void race(const Region& region, size_t offset, const Access& before, const char* first, bool write,
          const void* pc) {
  report("race", region.name,
         format("%s: %s by %s and %s by %s, with no barrier between", element(region, offset).c_str(),
                first, thread_name(before.thread - 1).c_str(), verb(write),
                thread_name(current->block->index * threads_per_block() + current->index).c_str()),
         0, pc);
}

bool at_volatile = false;  // the access at hand is

bool conflicts(const Access& before, const Thread& now) {
  return before.thread && !(at_volatile && before.shared_word) && !ordered(before, now);
}

void track(Region& region, size_t offset, bool write, const void* pc) {
  Cell& cell = region.cells[offset / region.granule];
  const Thread& now = *current;
  if (conflicts(cell.write, now)) race(region, offset, cell.write, "written", write, pc);
  Access here;
  here.thread = now.block->index * threads_per_block() + now.index + 1;
  here.shared_word = at_volatile;
  here.block_epoch = now.block->barrier.epoch;
  here.warp_clock = now.known[now.lane];
  here.cluster_epoch = launch->cooperative ? 0 : now.cluster_arrived;
  here.grid_epoch = launch->cooperative ? launch->epoch + now.cluster_arrived : launch->epoch;
  if (write) {
    for (Access& read : cell.reads) {
      if (conflicts(read, now)) race(region, offset, read, "read", true, pc);
      read = Access();
    }
    cell.write = here;
    return;
  }
  Access* slot = &cell.reads[0];
  for (Access& read : cell.reads)
    if (read.thread == here.thread) slot = &read;
  if (slot->thread != here.thread)
    for (Access& read : cell.reads)  // what is ordered already need not be kept
      if (!read.thread || ordered(read, now)) slot = &read;
  *slot = here;
}

}  // namespace

// Whether some barrier stands between an access and what the thread does now.
bool ordered(const Access& before, const Thread& now) {
  uint32_t thread = before.thread - 1, in_block = threads_per_block();
  uint32_t block = thread / in_block, index = thread % in_block;
  if (launch->cooperative && before.grid_epoch < launch->epoch + now.cluster_passed) return true;
  if (before.grid_epoch < launch->epoch) return true;
  if (block == now.block->index) {
    if (index == now.index || before.block_epoch < now.block->barrier.epoch) return true;
    if (index / WARP == now.index / WARP && before.warp_clock <= now.known[index % WARP])
      return true;
  }
  for (const Block& other : now.block->group->blocks)
    if (!launch->cooperative && other.index == block && before.cluster_epoch < now.cluster_passed)
      return true;
  return false;
}

Region* allocate(const std::string& name, Role role, size_t size, unsigned granule,
                 unsigned misalignment) {
  if (!arena) reserve();
  size_t slots = (size + misalignment + 2 * MARGIN) / SLOT + 1;
  if (next_slot + slots >= SLOTS) {
    fprintf(stderr, "the arrays of this run need more than %zu GiB of addresses\n", SLOTS / 1024);
    exit(3);
  }
  regions.push_back(std::make_unique<Region>());
  Region& region = *regions.back();
  region.name = name;
  region.role = role;
  region.base = arena + next_slot * SLOT + MARGIN + misalignment;
  region.size = size;
  region.granule = granule;
  region.cells.resize(size / granule + 1);
  region.written.resize(size / granule + 1);
  for (size_t slot = next_slot; slot < next_slot + slots; ++slot) owners[slot] = &region;
  next_slot += slots;
  // Not a number in every floating-point type, within the array and a little way past it.
  memset(reinterpret_cast<void*>(region.base - 256), 0xff, size + 512);
  return &region;
}

size_t arena_mark() { return next_slot; }

void arena_release(size_t mark) {
  while (next_slot > mark) owners[--next_slot] = nullptr;
  while (!regions.empty() && regions.back()->owner) regions.pop_back();
}

void arena_clear() {
  while (next_slot) owners[--next_slot] = nullptr;
  regions.clear();
}

// The array an address belongs to or is nearest to; null where none ever was.
Region* region_at(uintptr_t address) {
  return arena && address - arena < SLOTS * SLOT ? owners[(address - arena) / SLOT] : nullptr;
}

void give_back(Region& region) {
  region.gone = true;
  std::vector<Cell>().swap(region.cells);
}

void fill(Region& region, const void* data) {
  memcpy(reinterpret_cast<void*>(region.base), data, region.size);
  std::fill(region.written.begin(), region.written.end(), 1);
}

void access(uintptr_t address, size_t size, bool write, const void* pc) {
  if (!current || address - reinterpret_cast<uintptr_t>(current->stack) < STACK) return;
  Region* found = region_at(address);
  if (!found) {
    Dl_info program;
    if (dladdr(reinterpret_cast<void*>(address), &program)) return;  // a constant of the source
    report("out-of-bounds", "nowhere",
           format("%zu bytes %s where no array is", size, verb(write)), 0, pc);
    abandon();
    return;
  }
  Region& region = *found;
  intptr_t offset = static_cast<intptr_t>(address - region.base);
  if (offset < 0 || static_cast<size_t>(offset) + size > region.size) {
    report("out-of-bounds", region.name,
           format("%s %s: %zu bytes at an array of %zu", element(region, offset).c_str(),
                  verb(write), size, region.size),
           0, pc);
    return;
  }
  if (region.gone) {
    report("given-back", region.name, element(region, offset) + " has been given back", 0, pc);
    abandon();
    return;
  }
  if (region.waiting) show_to_block(address, size);
  if (write && region.role == Role::input)
    report("input-written", region.name, element(region, offset) + " is an input", 0, pc);
  if (region.owner && region.owner->barrier.exited == region.owner->barrier.members)
    report("block-exited", region.name,
           format("%s %s after its block has left the kernel", element(region, offset).c_str(),
                  verb(write)),
           0, pc);
  for (size_t at = offset - offset % region.granule; at < offset + size; at += region.granule) {
    uint8_t& written = region.written[at / region.granule];
    if (!write && !written)
      report("uninitialised-read", region.name, element(region, at) + " is read, never written", 0,
             pc);
    if (write) written = 1;
    track(region, at, write, pc);
  }
}

// Such a value is seen by a thread that reads it again and again until it is there.
void volatile_access(uintptr_t address, size_t size, bool write, const void* pc) {
  if (current && write) {
    store_begins(address, size);
  } else if (current) {
    store_ends();
    show_to_block(address, size);
    poll(address);
  }
  at_volatile = true;
  access(address, size, write, pc);
  at_volatile = false;
}

void check_outputs() {
  for (const auto& region : regions) {
    if (region->role != Role::output) continue;
    size_t count = region->size / region->granule, missing = 0, first = 0;
    for (size_t i = count; i-- > 0;)
      if (!region->written[i]) ++missing, first = i;
    if (missing)
      report("unwritten-output", region->name,
             format("%s[%zu] and %zu more of %zu elements are never written", region->name.c_str(),
                    first, missing - 1, count),
             0);
  }
}

}  // namespace simt
