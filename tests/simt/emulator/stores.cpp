// Volatile stores to device memory, which other blocks come to see late and in another order than
// they were made in, as on a device. A fence ends that, for all that its block has stored.
//
// A store comes here before it happens. Once the thread does something else that comes here, it has
// happened: then the memory gets its old bytes back, and the new ones wait. What is not done: loads
// are not moved, and the threads of the storing block see a store at once.

#include <algorithm>
#include <cstring>

#include "engine.h"

namespace simt {

namespace {

constexpr size_t MOST = 16;  // bytes of a store, and elements

struct Store {
  Region* region = nullptr;
  const Block* block = nullptr;
  uintptr_t address = 0;
  size_t size = 0;
  bool slow = false;  // seen when no thread can go on without it, or by chance at last
  char bytes[MOST] = {};
  uint8_t written[MOST] = {};
};

Store begun;  // by the thread that runs; no region: none
std::vector<Store> waiting;

bool chance(unsigned in) { return randomness() % in == 0; }

uint8_t* first_mark(const Store& store) {
  return &store.region->written[(store.address - store.region->base) / store.region->granule];
}

size_t marks(const Store& store) {
  size_t granule = store.region->granule, at = (store.address - store.region->base) % granule;
  return (at + store.size + granule - 1) / granule;
}

bool overlap(const Store& store, uintptr_t address, size_t size) {
  return store.address < address + size && address < store.address + store.size;
}

// The oldest of the stores to the same bytes, as each place has one order for all.
void show(size_t index) {
  for (size_t i = 0; i < index; ++i)
    if (overlap(waiting[i], waiting[index].address, waiting[index].size)) index = i;
  Store store = waiting[index];
  waiting.erase(waiting.begin() + static_cast<ptrdiff_t>(index));
  --store.region->waiting;
  memcpy(reinterpret_cast<void*>(store.address), store.bytes, store.size);
  memset(first_mark(store), 1, marks(store));
  word_written();
}

}  // namespace

void store_begins(uintptr_t address, size_t size) {
  store_ends();
  Region* region = region_at(address);
  if (!region || region->owner || region->gone || address < region->base ||
      address + size > region->base + region->size || size > MOST) {
    word_written();  // at once
    return;
  }
  begun.region = region;
  begun.block = current->block;
  begun.address = address;
  begun.size = size;
  memcpy(begun.bytes, reinterpret_cast<void*>(address), size);
  memcpy(begun.written, first_mark(begun), marks(begun));
}

void store_ends() {
  if (!begun.region) return;
  Store store = begun;
  begun.region = nullptr;
  memcpy(store.bytes, reinterpret_cast<void*>(store.address), store.size);
  memcpy(reinterpret_cast<void*>(store.address), begun.bytes, store.size);
  memcpy(first_mark(store), store.written, marks(store));
  store.slow = chance(2);
  ++store.region->waiting;
  waiting.push_back(store);
  if (chance(2)) show(waiting.size() - 1);
}

// What the running thread's block has stored there is there for it.
void show_to_block(uintptr_t address, size_t size) {
  for (size_t i = 0; i < waiting.size();) {
    bool mine = waiting[i].block == current->block && overlap(waiting[i], address, size);
    if (mine) show(i);
    i = mine ? 0 : i + 1;
  }
}

void fence() {
  store_ends();
  for (size_t i = 0; i < waiting.size();) {
    bool mine = waiting[i].block == current->block;
    if (mine) show(i);
    i = mine ? 0 : i + 1;
  }
}

void show_by_chance() {
  if (waiting.empty() || !chance(4)) return;
  size_t index = randomness() % waiting.size();
  if (!waiting[index].slow || chance(64)) show(index);
}

bool show_one() {
  if (waiting.empty()) return false;
  show(randomness() % waiting.size());
  return true;
}

void forget_stores() {
  begun.region = nullptr;
  for (Store& store : waiting) --store.region->waiting;
  waiting.clear();
}

}  // namespace simt
