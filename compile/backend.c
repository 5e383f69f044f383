/* What a kernel needs of TVM's runtime, so that a library runs without it.
 *
 * Generated code reaches the runtime through the three pointers at the end, which it declares weak
 * and leaves null. The linker's version script hides them, so that the loader does not put TVM's
 * own functions there where TVM is in the process: kernels run the same way everywhere.
 *
 * One thread pool serves all libraries of a process. The first one to be loaded offers its
 * functions in tvm_ffi's table of global functions, and the others take them from there. The one
 * that offers them is never unmapped. What stands behind the name of the offer may grow at its end;
 * a change of anything else takes a new name. Kernels rely on its pool for what they rely on in their
 * own: since v2, that each thread has its streamed stores seen before its tasks count as done.
 */
#define _GNU_SOURCE
#include "backend.h"

#include <dlfcn.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

KEEP_OLD(dladdr);
KEEP_OLD(dlopen);

/* Looked up when they are first called, as far as the loader is concerned: a program that opens a
 * library without tvm_ffi finds them null. */
#pragma weak TVMFFIErrorMoveFromRaised
#pragma weak TVMFFIErrorSetRaised
#pragma weak TVMFFIErrorSetRaisedFromCStr
#pragma weak TVMFFIFunctionCall
#pragma weak TVMFFIFunctionCreate
#pragma weak TVMFFIFunctionGetGlobal
#pragma weak TVMFFIFunctionSetGlobal
#pragma weak TVMFFIObjectDecRef

#define OFFER "normgraph.backend.v2"

typedef struct {
  int (*launch)(parallel_body, void*, int);
  void* (*alloc)(int, int, uint64_t, int, int);
  int (*free)(int, int, void*);
} backend;

static const backend own = {launch_in_pool, alloc_workspace, free_workspace};

static int (*launch_anywhere)(parallel_body, void*, int) = launch_serially;
static _Thread_local bool stays;

/* A kernel says here, before its loops, whether they are too small for several threads. */
int32_t normgraph_stay_on_thread(int32_t small) {
  stays = small;
  return 0;
}

static int launch(parallel_body body, void* data, int num_task) {
  return (stays ? launch_serially : launch_anywhere)(body, data, num_task);
}

int (*__TVMBackendParallelLaunch)(parallel_body, void*, int) = launch;
void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = alloc_workspace;
int (*__TVMBackendFreeWorkspace)(int, int, void*) = free_workspace;

void set_error(const char* kind, const char* message) {
  if (TVMFFIErrorSetRaisedFromCStr) TVMFFIErrorSetRaisedFromCStr(kind, message);
}

/* This thread's error, to be given to another; null where there is none. */
void* take_error(void) {
  TVMFFIObjectHandle error = NULL;
  if (TVMFFIErrorMoveFromRaised) TVMFFIErrorMoveFromRaised(&error);
  return error;
}

void give_error(void* error) {
  if (!error) return;
  TVMFFIErrorSetRaised(error);
  TVMFFIObjectDecRef(error);
}

void drop_error(void* error) {
  if (error) TVMFFIObjectDecRef(error);
}

static int give_backend(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  (void)self, (void)args, (void)count;
  result->type_index = kTVMFFIOpaquePtr;
  result->v_ptr = (void*)&own;
  return 0;
}

static int set_num_threads(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  (void)self, (void)result;
  if (count != 1 || args[0].type_index != kTVMFFIInt || args[0].v_int64 < 1 ||
      args[0].v_int64 > MOST_THREADS) {
    set_error("ValueError", "set_num_threads: expected one whole number from 1 to 256");
    return -1;
  }
  set_pool_threads((int)args[0].v_int64);
  return 0;
}

static int get_num_threads(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  (void)self, (void)args, (void)count;
  int threads = pool_threads();
  if (threads == 0) return -1;
  result->type_index = kTVMFFIInt;
  result->v_int64 = threads;
  return 0;
}

static TVMFFIByteArray bytes_of(const char* text) {
  TVMFFIByteArray bytes = {text, strlen(text)};
  return bytes;
}

static int offer(const char* name, TVMFFISafeCallType call) {
  TVMFFIObjectHandle function = NULL;
  TVMFFIByteArray bytes = bytes_of(name);
  if (TVMFFIFunctionCreate(NULL, call, NULL, &function) != 0) return -1;
  int status = TVMFFIFunctionSetGlobal(&bytes, function, 1);
  TVMFFIObjectDecRef(function);
  return status;
}

static const backend* offered(void) {
  TVMFFIObjectHandle function = NULL;
  TVMFFIByteArray name = bytes_of(OFFER);
  if (TVMFFIFunctionGetGlobal(&name, &function) != 0 || !function) return NULL;
  TVMFFIAny result;
  memset(&result, 0, sizeof result);
  int status = TVMFFIFunctionCall(function, NULL, 0, &result);
  TVMFFIObjectDecRef(function);
  return status == 0 && result.type_index == kTVMFFIOpaquePtr ? result.v_ptr : NULL;
}

/* Keeps this library mapped for as long as the process lives. */
static int stay(void) {
  Dl_info here;
  return dladdr((void*)&own, &here) &&
         dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE) != NULL;
}

/* Runs under the loader's lock, so that no two libraries do this at once. */
__attribute__((constructor)) static void choose_backend(void) {
  const backend* chosen = TVMFFIFunctionGetGlobal ? offered() : NULL;
  if (!chosen) {
    /* Threads must not outlive their code, nor a child miss them: else there are none. */
    if (!stay() || !handle_forks()) return;
    chosen = &own;
    if (TVMFFIFunctionSetGlobal && offer(OFFER, give_backend) == 0) {
      offer("normgraph.set_num_threads", set_num_threads);
      offer("normgraph.get_num_threads", get_num_threads);
    }
  }
  launch_anywhere = chosen->launch;
  __TVMBackendAllocWorkspace = chosen->alloc;
  __TVMBackendFreeWorkspace = chosen->free;
}
