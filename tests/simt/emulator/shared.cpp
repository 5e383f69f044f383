// The shared memory of blocks: an array a declaration, one set of them a block.

#include "engine.h"

namespace simt {

namespace {

// Aligned as declared and no better, so that luck does not hide a misaligned access.
Region* make(Block& block, size_t id, const std::string& name, size_t size, size_t granule,
             size_t alignment) {
  if (block.shared.size() <= id) block.shared.resize(id + 1);
  if (!block.shared[id]) {
    block.shared[id] = allocate(name, Role::shared, size, static_cast<unsigned>(granule),
                                static_cast<unsigned>(alignment));
    block.shared[id]->owner = &block;
    if (id) block.shared_bytes += size;
  }
  return block.shared[id];
}

bool holds(const Region* region, const void* address) {
  return region && reinterpret_cast<uintptr_t>(address) - region->base <= region->size;
}

}  // namespace

void* shared_memory(int id, const char* name, size_t size, size_t granule, size_t alignment) {
  Region* region = make(*current->block, static_cast<size_t>(id), name,
                        id ? size : launch->dynamic_shared, granule, alignment);
  return reinterpret_cast<void*>(region->base);
}

unsigned shared_rank(const void* address) {
  for (const Block& block : current->block->group->blocks)
    for (const Region* region : block.shared)
      if (holds(region, address)) return block.rank;
  return current->block->rank;
}

// The same place in the shared memory of another block of the cluster.
void* map_shared(const void* address, unsigned rank, int line) {
  Block& block = *current->block;
  for (size_t id = 0; id < block.shared.size(); ++id) {
    const Region* own = block.shared[id];
    if (!holds(own, address) || rank >= block.group->blocks.size()) continue;
    size_t alignment = own->base & -own->base;
    Region* other =
        make(block.group->blocks[rank], id, own->name, own->size, own->granule, alignment);
    return reinterpret_cast<void*>(other->base + (reinterpret_cast<uintptr_t>(address) - own->base));
  }
  report("out-of-bounds", "cluster", format("no shared memory of rank %u to map", rank), line);
  abandon();
  return nullptr;
}

}  // namespace simt
