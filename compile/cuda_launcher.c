/* What a CUDA library needs to launch its kernels, over the driver API alone.
 *
 * TVM's host code finds a kernel through __TVMFFIEnvModLookupFromImports and calls it through
 * __TVMFFIFunctionCall, with the kernel's arguments and then its launch parameters. These are defined
 * here, hidden, so that the loader does not replace them with its own. Workspaces come from the
 * caller's allocator where it has one (PyTorch's), else from a memory pool of the library's own, both
 * in the order of the stream. Kernels run on the caller's current stream. Nothing here waits for the
 * device, so calls can be captured into CUDA graphs.
 */
#include <stdio.h>
#include <string.h>
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

#include "cuda_launcher.h"

#define HIDDEN __attribute__((visibility("hidden")))

/* Of the call this thread is in, the workspaces to give back should it fail, and their stream. */
enum { MOST_WORKSPACES = 128 };
static _Thread_local struct {
  void* memory;
  TVMFFIObjectHandle tensor; /* of the caller's allocator; NULL: of the pool */
  stream on;
} workspaces[MOST_WORKSPACES];
static _Thread_local int workspace_count = 0;

static stream current_stream(void) { return TVMFFIEnvGetStream(DEVICE_TYPE_CUDA, normgraph_device); }

/* Generated code returns at the first error and gives nothing back by itself. The error that is set
 * is the one that is told: those of giving back are not. */
static int abandon(void) {
  while (workspace_count) {
    context popped;
    int last = --workspace_count;
    if (workspaces[last].tensor) {
      TVMFFIObjectDecRef(workspaces[last].tensor);
    } else if (normgraph_cu.context_push(normgraph_opened()->primary) == 0) {
      normgraph_cu.pool_free((address)(uintptr_t)workspaces[last].memory, workspaces[last].on);
      normgraph_cu.context_pop(&popped);
    }
  }
  return -1;
}

/* Workspaces. */

static int make_pool(device* here) {
  pool_properties wanted;
  uint64_t all = UINT64_MAX;
  int mode = CAPTURE_RELAXED;
  status code = 0;
  pthread_mutex_lock(&normgraph_lock);
  if (!here->workspaces) {
    pool made;
    memset(&wanted, 0, sizeof wanted);
    wanted.alloc_type = 1;    /* CU_MEM_ALLOCATION_TYPE_PINNED */
    wanted.location_type = 1; /* CU_MEM_LOCATION_TYPE_DEVICE */
    wanted.location_id = normgraph_device;
    normgraph_cu.exchange_capture_mode(&mode);
    code = normgraph_cu.pool_create(&made, &wanted);
    /* Memory stays in the pool instead of going back at every synchronisation. */
    if (!code) code = normgraph_cu.pool_set(made, POOL_KEEPS, &all);
    normgraph_cu.exchange_capture_mode(&mode);
    if (!code) here->workspaces = made;
  }
  pthread_mutex_unlock(&normgraph_lock);
  return code ? normgraph_failed(code, "making a memory pool") : 0;
}

static void* callers_workspace(uint64_t bytes, TVMFFIObjectHandle* tensor) {
  int64_t size = (int64_t)bytes;
  DLTensor wanted;
  memset(&wanted, 0, sizeof wanted);
  wanted.device.device_type = kDLCUDA;
  wanted.device.device_id = normgraph_device;
  wanted.ndim = 1;
  wanted.dtype.code = kDLUInt;
  wanted.dtype.bits = 8;
  wanted.dtype.lanes = 1;
  wanted.shape = &size;
  if (TVMFFIEnvTensorAlloc(&wanted, tensor)) return NULL;
  return ((DLTensor*)((char*)*tensor + sizeof(TVMFFIObject)))->data;
}

static void* pools_workspace(uint64_t bytes) {
  device* here = normgraph_loaded();
  address made = 0;
  int pushed = 0;
  status code;
  if (!here || (!here->workspaces && make_pool(here)) || normgraph_enter(here, &pushed)) return NULL;
  code = normgraph_cu.pool_alloc(&made, bytes, here->workspaces, current_stream());
  normgraph_leave(pushed);
  if (code) {
    normgraph_failed(code, "allocating a workspace");
    return NULL;
  }
  return (void*)(uintptr_t)made;
}

static void* alloc_workspace(int device_type, int device_id, uint64_t bytes, int type_code,
                             int type_bits) {
  TVMFFIObjectHandle tensor = NULL;
  void* memory;
  (void)device_type;
  (void)device_id;
  (void)type_code;
  (void)type_bits;
  if (workspace_count == MOST_WORKSPACES) {
    normgraph_fail("a call has too many workspaces");
    abandon();
    return NULL;
  }
  if (!bytes) bytes = 1;
  if (TVMFFIEnvGetDLPackManagedTensorAllocator()) {
    memory = callers_workspace(bytes, &tensor);
  } else {
    memory = pools_workspace(bytes);
  }
  if (!memory) {
    abandon();
    return NULL;
  }
  workspaces[workspace_count].memory = memory;
  workspaces[workspace_count].tensor = tensor;
  workspaces[workspace_count].on = current_stream();
  ++workspace_count;
  return memory;
}

static int release(int index) {
  device* here = normgraph_opened();
  void* memory = workspaces[index].memory;
  TVMFFIObjectHandle tensor = workspaces[index].tensor;
  stream on = workspaces[index].on;
  int pushed = 0;
  status code;
  workspaces[index] = workspaces[--workspace_count];
  if (tensor) return TVMFFIObjectDecRef(tensor);
  if (normgraph_enter(here, &pushed)) return -1;
  code = normgraph_cu.pool_free((address)(uintptr_t)memory, on);
  normgraph_leave(pushed);
  return code ? normgraph_failed(code, "giving a workspace back") : 0;
}

static int free_workspace(int device_type, int device_id, void* memory) {
  (void)device_type;
  (void)device_id;
  for (int i = 0; i < workspace_count; ++i) {
    if (workspaces[i].memory == memory) return release(i) ? abandon() : 0;
  }
  normgraph_fail("a workspace was given back that is none");
  return abandon();
}

/* Kernels. */

typedef union {
  void* p;
  int64_t l;
  int32_t i;
  float f;
  double d;
  uint8_t b;
} argument;

enum { MOST_ARGUMENTS = 160, X = 0, BLOCK = 3, SHARED = 6, LAUNCH = 7 };

enum { TOGETHER = 'c' };

static const int64_t limits[LAUNCH] = {INT32_MAX, 65535, 65535, 1024, 1024, 64, INT32_MAX};

static int place(char tag) {
  static const char tags[] = "xyzXYZm";
  return (int)(strchr(tags, tag) - tags);
}

static int is_together(int index) {
  return strchr(normgraph_kernels[index].launch, TOGETHER) != NULL;
}

static int allow_shared(device* here, int index, int bytes) {
  status code = 0;
  if (bytes <= __atomic_load_n(&here->dynamic_shared[index], __ATOMIC_RELAXED)) return 0;
  pthread_mutex_lock(&normgraph_lock);
  if (bytes > here->dynamic_shared[index]) {
    code = normgraph_cu.function_attribute(here->functions[index], MAX_DYNAMIC_SHARED, bytes);
    /* Its blocks have to be resident: all of a multiprocessor's memory is to be shared, none L1. */
    if (!code && is_together(index)) {
      code = normgraph_cu.function_attribute(here->functions[index], SHARED_CARVEOUT, 100);
    }
    if (!code) __atomic_store_n(&here->dynamic_shared[index], bytes, __ATOMIC_RELAXED);
  }
  pthread_mutex_unlock(&normgraph_lock);
  return code ? normgraph_failed(code, "asking for shared memory") : 0;
}

/* Where the blocks have no room together nothing is launched, and host code asks for that. */
static status launch_together(device* here, int index, const unsigned* asked, void** pointers) {
  int64_t blocks = (int64_t)asked[X] * asked[X + 1] * asked[X + 2];
  unsigned threads = asked[BLOCK] * asked[BLOCK + 1] * asked[BLOCK + 2];
  status code = TOO_LARGE;
  if (normgraph_have_room(here, index, threads, asked[SHARED], blocks)) {
    code = normgraph_cu.launch_together(here->functions[index], asked[X], asked[X + 1], asked[X + 2],
                                        asked[BLOCK], asked[BLOCK + 1], asked[BLOCK + 2],
                                        asked[SHARED], current_stream(), pointers);
  }
  if (code != TOO_LARGE) return code;
  normgraph_refuse(here);
  return 0;
}

static int launch(int index, const TVMFFIAny* given) {
  const normgraph_kernel* kernel = &normgraph_kernels[index];
  argument values[MOST_ARGUMENTS];
  void* pointers[MOST_ARGUMENTS];
  int64_t sizes[LAUNCH] = {1, 1, 1, 1, 1, 1, 0};
  unsigned asked[LAUNCH];
  int count = (int)strlen(kernel->params), pushed = 0;
  device* here = normgraph_loaded();
  char text[256];
  status code;
  if (!here) return -1;
  if (count > MOST_ARGUMENTS) return normgraph_fail("a kernel has too many arguments");
  for (int i = 0; i < count; ++i) {
    pointers[i] = &values[i];
    switch (kernel->params[i]) {
      case 'p': values[i].p = given[i].v_ptr; break;
      case 'l': values[i].l = given[i].v_int64; break;
      case 'i': values[i].i = (int32_t)given[i].v_int64; break;
      case 'b': values[i].b = given[i].v_int64 != 0; break;
      case 'f': values[i].f = (float)given[i].v_float64; break;
      default: values[i].d = given[i].v_float64; break;
    }
  }
  for (int i = 0; kernel->launch[i] && kernel->launch[i] != TOGETHER; ++i) {
    int at = place(kernel->launch[i]);
    int64_t size = given[count + i].v_int64;
    if (size < 0 || size > limits[at]) {
      snprintf(text, sizeof text, "%s: a launch of %lld along %c is beyond what CUDA takes (%lld)",
               kernel->name, (long long)size, kernel->launch[i], (long long)limits[at]);
      return normgraph_fail(text);
    }
    sizes[at] = size;
  }
  for (int i = X; i < SHARED; ++i) {
    if (sizes[i] == 0) return 0; /* no thread, nothing to do */
  }
  if (normgraph_enter(here, &pushed)) return -1;
  if (sizes[SHARED] && allow_shared(here, index, (int)sizes[SHARED])) {
    normgraph_leave(pushed);
    return -1;
  }
  for (int i = X; i < LAUNCH; ++i) asked[i] = (unsigned)sizes[i];
  if (is_together(index)) {
    code = launch_together(here, index, asked, pointers);
  } else {
    code = normgraph_cu.launch(here->functions[index], asked[X], asked[X + 1], asked[X + 2],
                               asked[BLOCK], asked[BLOCK + 1], asked[BLOCK + 2], asked[SHARED],
                               current_stream(), pointers, NULL);
  }
  normgraph_leave(pushed);
  return code ? normgraph_failed(code, kernel->name) : 0;
}

/* What TVM's host code asks for. */

static const char set_device[] = "__tvm_set_device";

static int look_up(TVMFFIObjectHandle library, const char* name, TVMFFIObjectHandle* found) {
  char text[256];
  (void)library;
  if (strcmp(name, set_device) == 0) {
    *found = (void*)set_device;
    return 0;
  }
  for (int i = 0; i < normgraph_kernel_count; ++i) {
    if (strcmp(name, normgraph_kernels[i].name) == 0) {
      *found = (void*)&normgraph_kernels[i];
      return 0;
    }
  }
  snprintf(text, sizeof text, "the library has no kernel %s", name);
  return normgraph_fail(text);
}

/* Looking up twice does no harm: what is found is the same. */
static int look_up_once(void** handle, int (*look)(void**)) {
  void* found = __atomic_load_n(handle, __ATOMIC_ACQUIRE);
  int result;
  if (found) return 0;
  result = look(&found);
  if (!result) __atomic_store_n(handle, found, __ATOMIC_RELEASE);
  return result;
}

static int call(TVMFFIObjectHandle found, TVMFFIAny* args, int32_t count, TVMFFIAny* result) {
  (void)count;
  (void)result;
  if (found == (void*)set_device) {
    abandon(); /* what host code left that ended by itself, maybe on another device */
    normgraph_device = (int)args[1].v_int64;
    return normgraph_loaded() ? 0 : -1;
  }
  if (launch((int)((const normgraph_kernel*)found - normgraph_kernels), args)) return abandon();
  return 0;
}

/* For host code that asks how memory is aligned. */
HIDDEN int64_t normgraph_address(void* memory) { return (int64_t)(uintptr_t)memory; }

HIDDEN int (*__TVMFFIEnvModLookupFromImports)(TVMFFIObjectHandle, const char*,
                                              TVMFFIObjectHandle*) = look_up;
HIDDEN int (*__TVMFFIHandleInitOnce)(void**, int (*)(void**)) = look_up_once;
HIDDEN int (*__TVMFFIFunctionCall)(TVMFFIObjectHandle, TVMFFIAny*, int32_t, TVMFFIAny*) = call;
HIDDEN void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = alloc_workspace;
HIDDEN int (*__TVMBackendFreeWorkspace)(int, int, void*) = free_workspace;
