/* Scratch memory of kernels. A thread keeps a few blocks for its next calls, so that they neither
 * fault memory in anew nor meet at the allocator's lock. */
#include "backend.h"

#include <pthread.h>
#include <stdlib.h>

KEEP_OLD(pthread_key_create);
KEEP_OLD(pthread_once);
KEEP_OLD(pthread_setspecific);

enum { BLOCKS = 4, ALIGNMENT = 64 };
/* What a thread keeps at most; larger blocks go back at once. */
static const uint64_t most_kept = UINT64_C(8) << 20;

typedef struct {
  void* memory;
  uint64_t bytes;
  bool used;
} block;

static _Thread_local block kept[BLOCKS];

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t key;
static bool has_key;

static void forget(void* blocks) {
  for (block* each = blocks; each < (block*)blocks + BLOCKS; ++each) {
    free(each->memory);
    *each = (block){0};
  }
}

static void make_key(void) { has_key = pthread_key_create(&key, forget) == 0; }

/* The smallest free block that is large enough. */
static block* fitting(uint64_t bytes) {
  block* found = NULL;
  for (block* each = kept; each < kept + BLOCKS; ++each) {
    bool fits = each->memory && !each->used && each->bytes >= bytes;
    if (fits && (!found || each->bytes < found->bytes)) found = each;
  }
  return found;
}

/* A place to remember a new block in: blocks that were too small make room for it. */
static block* room(uint64_t bytes) {
  pthread_once(&once, make_key);
  if (!has_key || bytes > most_kept) return NULL;
  block* empty = NULL;
  uint64_t total = 0;
  for (block* each = kept; each < kept + BLOCKS; ++each) {
    if (!each->used && each->memory) {
      free(each->memory);
      *each = (block){0};
    }
    if (!each->memory) empty = each;
    total += each->bytes;
  }
  return total + bytes <= most_kept ? empty : NULL;
}

void* alloc_workspace(int device_type, int device_id, uint64_t bytes, int type_code,
                      int type_bits) {
  (void)device_type, (void)device_id, (void)type_code, (void)type_bits;
  block* place = fitting(bytes);
  if (place) {
    place->used = true;
    return place->memory;
  }
  place = room(bytes);
  void* memory = NULL;
  if (posix_memalign(&memory, ALIGNMENT, bytes ? bytes : ALIGNMENT) != 0) {
    set_error("MemoryError", "no memory for a kernel's workspace");
    return NULL;
  }
  if (place && pthread_setspecific(key, kept) == 0) *place = (block){memory, bytes, true};
  return memory;
}

int free_workspace(int device_type, int device_id, void* memory) {
  (void)device_type, (void)device_id;
  for (block* each = kept; each < kept + BLOCKS; ++each) {
    if (memory && each->memory == memory) {
      each->used = false;
      return 0;
    }
  }
  free(memory);
  return 0;
}
