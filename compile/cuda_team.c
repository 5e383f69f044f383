/* How many blocks of a kernel can be resident at a time, and into how many a slice is cut so that a
 * team of them holds it in shared memory. Host code asks before it launches.
 *
 * The answer is of the whole device as the driver describes it. A launch can be refused in spite of
 * it: on a stream that has only some of the multiprocessors (a green context's), or beside a tool
 * that takes shared memory for itself. Host code asks for that behind the launch, and then does
 * without teams.
 */
#include "cuda_launcher.h"

#define HIDDEN __attribute__((visibility("hidden")))

/* Of CUdevice_attribute. */
enum {
  MULTIPROCESSORS = 16,
  L2_BYTES = 38,
  THREADS_HERE = 39, /* of a multiprocessor */
  SHARED_HERE = 81,
  COOPERATIVE = 95,
  SHARED_OF_A_BLOCK = 97,
  SHARED_RESERVED = 111 /* of each block */
};

/* Blocks of a team at most: cuda_team.py has room for so many. */
enum { MOST_BLOCKS = 256 };
/* What an exchange costs of the time that a block's memory traffic takes, in bytes: half a
 * microsecond, which the other block of the multiprocessor does not hide, at 4.3 TB/s / 264. */
enum { EXCHANGE_BYTES = 8192 };

/* 0 where the driver does not know, as one older than the attribute. */
static int64_t ask(int attribute) {
  int value = 0, handle;
  if (normgraph_cu.device_get(&handle, normgraph_device) ||
      normgraph_cu.device_attribute(&value, attribute, handle)) {
    return 0;
  }
  return value;
}

/* Of the call this thread is in: its blocks were not launched. */
static _Thread_local int refused = 0;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Resident blocks of a kernel compiled to have `most` of them on a multiprocessor. */
HIDDEN int64_t normgraph_resident_blocks(int64_t threads, int64_t most) {
  if (!normgraph_loaded() || !ask(COOPERATIVE)) return 0;
  return ask(MULTIPROCESSORS) * least(most, ask(THREADS_HERE) / threads);
}

int normgraph_have_room(const device* here, int index, unsigned threads, unsigned shared,
                        int64_t blocks) {
  int each = 0;
  /* Where it cannot be told, the launch will. */
  if (normgraph_cu.occupancy(&each, here->functions[index], (int)threads, shared)) return 1;
  return blocks <= ask(MULTIPROCESSORS) * each;
}

void normgraph_refuse(device* here) {
  refused = 1;
  __atomic_store_n(&here->apart, 1, __ATOMIC_RELAXED);
}

/* Whether the teams that this thread asked for last were refused when they were launched. */
HIDDEN int64_t normgraph_teams_refused(void) { return refused; }

/* The blocks of a team that holds a slice; 0 where no team can, or where it would gain nothing.
 *
 * A slice is `rows` rows of `vectors` vectors, and each row has blocks of its own; a block holds
 * `bytes` for a vector, of which it reads `read`, and has `beside` bytes of static shared memory.
 *
 * It gains where the next traversal would not find in L2 what the last one read: where the inputs
 * are larger than half of it, as the outputs go through it too. Of all sizes of a team the best has
 * the shortest time until the last slice is done: rounds of a chunk and an exchange each.
 */
HIDDEN int64_t normgraph_team_blocks(int64_t slices, int64_t rows, int64_t vectors, int64_t read,
                                     int64_t bytes, int64_t threads, int64_t most, int64_t beside) {
  int64_t resident = normgraph_resident_blocks(threads, most), room, best = 0, least_time = 0;
  refused = 0;
  /* A second question of the same call must not get another answer than the first: only here. */
  if (resident && __atomic_load_n(&normgraph_opened()->apart, __ATOMIC_RELAXED)) return 0;
  if (resident == 0 || slices == 0 || rows == 0 || vectors == 0) return 0;
  if (2 * slices * rows * vectors * read < ask(L2_BYTES)) return 0;
  room = least(ask(SHARED_HERE) / most - ask(SHARED_RESERVED), ask(SHARED_OF_A_BLOCK)) - beside;
  room -= room % (threads * bytes); /* a vector a thread at a time */
  if (room <= 0) return 0;
  for (int64_t parts = (vectors * bytes + room - 1) / room;
       parts * rows <= least(resident, MOST_BLOCKS); ++parts) {
    int64_t blocks = parts * rows, teams = least(resident / blocks, slices);
    int64_t chunk = (vectors + parts - 1) / parts * read;
    int64_t time = (slices + teams - 1) / teams * (chunk + EXCHANGE_BYTES);
    if (best == 0 || time < least_time) {
      best = blocks;
      least_time = time;
    }
  }
  return best;
}
