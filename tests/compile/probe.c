/* Parallel loops that tests look into, linked and loaded as kernels are. Arguments are ints:
 * numbers, and addresses of arrays. */
#define _GNU_SOURCE
#include "backend.h"

#include <sched.h>
#include <stdatomic.h>
#include <time.h>
#include <tvm/ffi/c_api.h>

extern int (*__TVMBackendParallelLaunch)(parallel_body, void*, int);
extern void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
extern int (*__TVMBackendFreeWorkspace)(int, int, void*);

typedef struct {
  int64_t elements;
  int32_t* hits;
  int64_t refused; /* the element at which a task fails, or -1 */
  int64_t inner;   /* each element runs a loop of this many elements, if any */
} work;

static int64_t share_begins(int64_t elements, int number, const task_env* env) {
  int64_t step = (elements + env->num_task - 1) / env->num_task;
  return number * step < elements ? number * step : elements;
}

static int count(int number, task_env* env, void* data) {
  const work* of = data;
  int64_t end = share_begins(of->elements, number + 1, env);
  for (int64_t i = share_begins(of->elements, number, env); i < end; ++i) {
    if (i == of->refused) {
      set_error("ValueError", "an element is refused");
      return -1;
    }
    if (of->inner) {
      work inner = {of->inner, of->hits + i * of->inner, -1, 0};
      int status = __TVMBackendParallelLaunch(count, &inner, 0);
      if (status != 0) return status;
    } else {
      of->hits[i]++;
    }
  }
  return 0;
}

/* run(elements, hits, refused, inner, num_task) */
int __tvm_ffi_run(void* self, const TVMFFIAny* args, int32_t n, TVMFFIAny* result) {
  (void)self, (void)n, (void)result;
  work all = {args[0].v_int64, (int32_t*)args[1].v_int64, args[2].v_int64, args[3].v_int64};
  return __TVMBackendParallelLaunch(count, &all, (int)args[4].v_int64);
}

typedef struct {
  int wanted;
  _Atomic int inside;
  _Atomic int most;
} meeting;

/* Stays until as many threads as are wanted are in tasks at once, for 10 seconds at most. */
static int meet(int number, task_env* env, void* data) {
  (void)number, (void)env;
  meeting* at = data;
  int inside = atomic_fetch_add(&at->inside, 1) + 1;
  int most = atomic_load(&at->most);
  while (inside > most && !atomic_compare_exchange_weak(&at->most, &most, inside)) {
  }
  struct timespec start, now;
  clock_gettime(CLOCK_MONOTONIC, &start);
  do {
    sched_yield();
    clock_gettime(CLOCK_MONOTONIC, &now);
  } while (atomic_load(&at->most) < at->wanted && now.tv_sec - start.tv_sec < 10);
  atomic_fetch_sub(&at->inside, 1);
  return 0;
}

/* threads_at_once(wanted) */
int __tvm_ffi_threads_at_once(void* self, const TVMFFIAny* args, int32_t n, TVMFFIAny* result) {
  (void)self, (void)n;
  meeting at = {(int)args[0].v_int64, 0, 0};
  int status = __TVMBackendParallelLaunch(meet, &at, 0);
  result->type_index = kTVMFFIInt;
  result->v_int64 = atomic_load(&at.most);
  return status;
}

/* Notes into how many tasks the loop was cut, and takes so many microseconds each. */
static int idle(int number, task_env* env, void* data) {
  int64_t* of = data;
  uint64_t end = nanoseconds() + (uint64_t)of[0] * 1000;
  if (number == 0) of[1] = env->num_task;
  while (nanoseconds() < end) {
  }
  return 0;
}

/* tasks(microseconds): how many */
int __tvm_ffi_tasks(void* self, const TVMFFIAny* args, int32_t n, TVMFFIAny* result) {
  (void)self, (void)n;
  int64_t of[2] = {args[0].v_int64, 0};
  int status = __TVMBackendParallelLaunch(idle, of, 0);
  result->type_index = kTVMFFIInt;
  result->v_int64 = of[1];
  return status;
}

/* quota(path): how many CPUs the control groups below a root directory allow */
int __tvm_ffi_quota(void* self, const TVMFFIAny* args, int32_t n, TVMFFIAny* result) {
  (void)self, (void)n;
  result->type_index = kTVMFFIInt;
  result->v_int64 = cpu_quota((const char*)args[0].v_int64);
  return 0;
}

/* scratch(bytes, addresses, count): takes and returns that many blocks */
int __tvm_ffi_scratch(void* self, const TVMFFIAny* args, int32_t n, TVMFFIAny* result) {
  (void)self, (void)n, (void)result;
  void** blocks = (void**)args[1].v_int64;
  for (int64_t i = 0; i < args[2].v_int64; ++i) {
    blocks[i] = __TVMBackendAllocWorkspace(kDLCPU, 0, (uint64_t)args[0].v_int64, kDLFloat, 32);
    if (!blocks[i]) return -1;
    *(volatile char*)blocks[i] = 1;
  }
  for (int64_t i = 0; i < args[2].v_int64; ++i) __TVMBackendFreeWorkspace(kDLCPU, 0, blocks[i]);
  return 0;
}
