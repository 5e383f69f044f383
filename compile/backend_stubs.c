/* Strong definitions of what a kernel needs from TVM's runtime, so that a library runs without it.
 *
 * Generated code reaches the runtime through these pointers, which it declares weak and leaves
 * null. Where TVM's own runtime is in the process, the loader overwrites them and its thread pool
 * is used; without it, parallel loops run on the calling thread.
 */
#include <stdint.h>
#include <stdlib.h>

typedef struct {
  void* sync_handle;
  int32_t num_task;
} group_env;

typedef int (*parallel_lambda)(int task_id, group_env* env, void* data);

static int launch_serially(parallel_lambda body, void* data, int num_task) {
  group_env env = {NULL, 1};
  (void)num_task;
  return body(0, &env, data);
}

static void* alloc_workspace(int device_type, int device_id, uint64_t bytes, int type_code,
                             int type_bits) {
  void* memory = NULL;
  (void)device_type;
  (void)device_id;
  (void)type_code;
  (void)type_bits;
  return posix_memalign(&memory, 64, bytes ? bytes : 64) == 0 ? memory : NULL;
}

static int free_workspace(int device_type, int device_id, void* memory) {
  (void)device_type;
  (void)device_id;
  free(memory);
  return 0;
}

int (*__TVMBackendParallelLaunch)(parallel_lambda, void*, int) = launch_serially;
void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = alloc_workspace;
int (*__TVMBackendFreeWorkspace)(int, int, void*) = free_workspace;
