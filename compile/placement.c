/* Where a worker may run. On the CPU of a launching thread it gets no turn before the work is done,
 * and the scheduler may leave it there although another CPU is idle. So it leaves that CPU. */
#define _GNU_SOURCE
#include "backend.h"

#include <sched.h>
#include <string.h>

/* A worker changes its CPU at most this often, in nanoseconds. */
enum { MOVE_AFTER = 1000000 };

/* The CPUs this thread may use as the system has it: none where that cannot be found out. */
static cpu_mask current(void) {
  cpu_mask cpus;
  memset(&cpus, 0, sizeof cpus);
  if (sched_getaffinity(0, sizeof cpus, (cpu_set_t*)&cpus) != 0) memset(&cpus, 0, sizeof cpus);
  return cpus;
}

/* Refused where none of them is left to this process. */
static void stay_on(placement* of, const cpu_mask* cpus) {
  sched_setaffinity(0, sizeof *cpus, (const cpu_set_t*)cpus);
  of->set = current();
}

/* Not the creator's mask: a pool that binds threads may have bound it to one CPU. */
void place_worker(placement* of) {
  memset(of, 0, sizeof *of);
  cpus_of_process(&of->allowed);
  stay_on(of, &of->allowed);
}

void leave_cpu(placement* of, int launching) {
  int cpu = sched_getcpu();
  if (cpu < 0 || cpu != launching) return;
  uint64_t now = nanoseconds();
  if (now - of->moved < MOVE_AFTER) return;
  of->moved = now;
  cpu_mask others = current();
  /* Somebody else may have bound this thread since. */
  if (memcmp(&others, &of->set, sizeof others) != 0) of->allowed = others;
  others = of->allowed;
  enum { BITS = 8 * sizeof *others.words };
  if ((size_t)cpu >= sizeof others * 8) return;
  others.words[(size_t)cpu / BITS] &= ~(1UL << (size_t)cpu % BITS);
  stay_on(of, &others);
}
