/* A loop of a few microseconds on a thread pool, timed launch by launch.

   Compiled with -fopenmp it runs on OpenMP's pool, with -DSERIAL on the calling thread, else on the
   pool that __TVMBackendParallelLaunch leads to. */
#include <stdint.h>
#include <time.h>
#include <tvm/ffi/c_api.h>

typedef struct {
  void *sync_handle;
  int32_t num_task;
} task_env;

typedef int (*parallel_body)(int task, task_env *env, void *data);

typedef struct {
  int64_t elements;
  const float *source;
  float *goal;
} work;

__attribute__((weak)) int (*__TVMBackendParallelLaunch)(parallel_body, void *, int);

/* Neither inlined nor cloned: the same code on every pool. */
__attribute__((noinline, noclone)) static int scale(int task, task_env *env, void *data) {
  const work *of = data;
  int64_t step = (of->elements + env->num_task - 1) / env->num_task;
  int64_t end = step * (task + 1) < of->elements ? step * (task + 1) : of->elements;
  for (int64_t i = step * task; i < end; ++i) of->goal[i] = 1.5f * of->source[i] + 2.0f;
  return 0;
}

static int launch(work *of, int threads) {
#if defined(SERIAL)
  task_env all = {0, 1};
  (void)threads;
  return scale(0, &all, of);
#elif defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int task = 0; task < threads; ++task) {
    task_env env = {0, threads};
    scale(task, &env, of);
  }
  return 0;
#else
  (void)threads;
  return __TVMBackendParallelLaunch(scale, of, 0);
#endif
}

static int64_t nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* launches(elements, source, goal, threads, pause, count, taken): nanoseconds of each launch, that
   many of which pass between two. */
int __tvm_ffi_launches(void *self, const TVMFFIAny *args, int32_t n, TVMFFIAny *result) {
  (void)self, (void)n, (void)result;
  work of = {args[0].v_int64, (const float *)args[1].v_int64, (float *)args[2].v_int64};
  int64_t *taken = (int64_t *)args[6].v_int64;
  for (int64_t i = 0; i < args[5].v_int64; ++i) {
    int64_t start = nanoseconds(), ready = start + args[4].v_int64;
    while (start < ready) start = nanoseconds();
    int status = launch(&of, (int)args[3].v_int64);
    if (status != 0) return status;
    taken[i] = nanoseconds() - start;
  }
  return 0;
}
