/* What the C files of this folder share. They are linked into every library; see backend.c. */
#ifndef NORMGRAPH_BACKEND_H_
#define NORMGRAPH_BACKEND_H_

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

enum { MOST_THREADS = 256 };

/* TVM's TVMParallelGroupEnv: a task works out its share from its number and `num_task`. */
typedef struct {
  void* sync_handle;
  int32_t num_task;
} task_env;

typedef int (*parallel_body)(int task, task_env* env, void* data);

/* thread_pool.c */
bool handle_forks(void); /* to be called once, before anything is launched */
int launch_in_pool(parallel_body body, void* data, int num_task);
int launch_serially(parallel_body body, void* data, int num_task);
int pool_threads(void); /* 0: NORMGRAPH_NUM_THREADS is wrong, and the error is set */
void set_pool_threads(int threads);

/* workspace.c */
void* alloc_workspace(int device_type, int device_id, uint64_t bytes, int type_code, int type_bits);
int free_workspace(int device_type, int device_id, void* memory);

/* cpu_count.c */
typedef struct {
  unsigned long words[8192 / (8 * sizeof(long))];
} cpu_mask;
int cpus_of_process(cpu_mask* mask); /* how many, and which */
int cpu_quota(const char* root);     /* 0: no limit */
int default_threads(void);           /* 0: NORMGRAPH_NUM_THREADS is wrong */

/* placement.c */
typedef struct {
  cpu_mask allowed;
  cpu_mask set; /* what the worker last asked for, as the system took it */
  uint64_t moved;
} placement;
void place_worker(placement* of);
void leave_cpu(placement* of, int launching);

static inline uint64_t nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* A pause in a loop that waits. */
static inline void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* Stores that went past the caches (streaming.py) are seen before what follows: x86 keeps other
 * stores in order, but not those. */
static inline void order_stores(void) {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

/* backend.c */
void set_error(const char* kind, const char* message);
void* take_error(void);
void give_error(void* error); /* takes the error over */
void drop_error(void* error);

/* The versions these functions have had longest: a library linked where the C library is new
 * otherwise refuses to load where it is older than glibc 2.34. */
#if defined(__GLIBC__) && defined(__x86_64__)
#define OLD_VERSION "GLIBC_2.2.5"
#elif defined(__GLIBC__) && defined(__aarch64__)
#define OLD_VERSION "GLIBC_2.17"
#endif
#ifdef OLD_VERSION
#define KEEP_OLD(name) __asm__(".symver " #name "," #name "@" OLD_VERSION)
#else
#define KEEP_OLD(name) _Static_assert(1, "")
#endif

#endif
