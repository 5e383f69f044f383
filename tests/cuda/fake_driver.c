/* A CUDA driver of the functions that the package uses, without a device.
 *
 * Device memory is host memory. Every call is noted as a line of text that the tests read. A launch
 * runs the kernel where a library of kernels compiled for the host was given: at once, or, once it
 * is told to be late, when somebody waits for its stream, as a device may. Streams do not wait for
 * one another then, nor for the default stream: all of them are non-blocking, as PyTorch's.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_DEVICES = 8, LOG_BYTES = 1 << 20, OK = 0, INVALID = 1, NO_DEVICE = 100, NO_IMAGE = 209 };
enum { RELAXED = 2, TOO_LARGE = 720, CAPTURE_UNSUPPORTED = 900 };
enum { MULTIPROCESSORS = 16, MOST_ARGUMENTS = 160, ANY_OCCUPANCY = 32 };

static struct {
  int version, devices, capability[MOST_DEVICES], failure, spared;
  int attributes[128];
  char failing[64];
  char log[LOG_BYTES];
  size_t used;
  void* kernels;
  int live, capturing, late, occupancy, usable;
} fake = {.version = 13000,
          .devices = 1,
          .capability = {90, 90, 90, 90, 90, 90, 90, 90},
          .occupancy = ANY_OCCUPANCY};
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread void* stack[16];
static __thread int depth = 0;
static __thread int capture_mode = 0;

static void note(const char* format, ...) {
  va_list args;
  pthread_mutex_lock(&lock);
  va_start(args, format);
  if (fake.used < LOG_BYTES - 512) {
    fake.used += (size_t)vsnprintf(fake.log + fake.used, 512, format, args);
    fake.log[fake.used++] = '\n';
    fake.log[fake.used] = 0;
  }
  va_end(args);
  pthread_mutex_unlock(&lock);
}

#define CHECK(name)                                                                    \
  do {                                                                                 \
    if (strcmp(fake.failing, name) == 0 && fake.spared-- <= 0) return fake.failure;    \
  } while (0)

/* What waits for the device or may, while a thread that allows no such call captures a graph. */
#define NOT_CAPTURED(name)                         \
  do {                                             \
    if (fake.capturing && capture_mode != RELAXED) { \
      note("forbidden %s", name);                  \
      return CAPTURE_UNSUPPORTED;                  \
    }                                              \
  } while (0)

/* What a stream has still to do, in the order in which it was asked for. */

typedef void kernel(void**, const unsigned*, unsigned);

typedef struct work {
  struct work* next;
  void* stream;
  kernel* run; /* or NULL: a copy */
  unsigned sizes[6], shared;
  uint64_t values[MOST_ARGUMENTS];
  void *target, *staged; /* without bytes: memory to give back */
  size_t bytes;
} work;
static work* waiting = NULL;

static work* later(void* stream) {
  work **end = &waiting, *made = calloc(1, sizeof *made);
  made->stream = stream;
  while (*end) end = &(*end)->next;
  return *end = made;
}

static void done(work* each) {
  void* args[MOST_ARGUMENTS];
  for (int i = 0; i < MOST_ARGUMENTS; ++i) args[i] = &each->values[i];
  if (each->run) each->run(args, each->sizes, each->shared);
  if (each->bytes) memcpy(each->target, each->staged, each->bytes);
  if (!each->run && !each->bytes) free(each->target);
  free(each->staged);
  free(each);
}

/* The work of a stream, or of all others. */
static void finish(void* stream, int others) {
  for (work** at = &waiting; *at;) {
    work* each = *at;
    if ((each->stream == stream) != others) {
      *at = each->next;
      done(each);
    } else {
      at = &each->next;
    }
  }
}

/* The default stream's last: kernels of others that rely on it come too early. */
static void finish_all(void) { finish(NULL, 1), finish(NULL, 0); }

/* For the tests. */

void fake_reset(void) {
  finish_all();
  fake.version = 13000;
  fake.devices = 1;
  for (int i = 0; i < MOST_DEVICES; ++i) fake.capability[i] = 90;
  for (int i = 0; i < 128; ++i) fake.attributes[i] = 1;
  fake.failing[0] = 0;
  fake.used = 0;
  fake.log[0] = 0;
  fake.kernels = NULL;
  fake.capturing = fake.late = fake.usable = 0;
  fake.occupancy = ANY_OCCUPANCY;
}
void fake_version(int version) { fake.version = version; }
void fake_devices(int count) { fake.devices = count; }
void fake_capability(int device, int capability) { fake.capability[device] = capability; }
void fake_attribute(int attribute, int value) { fake.attributes[attribute] = value; }
void fake_fail(const char* name, int status, int spared) {
  snprintf(fake.failing, sizeof fake.failing, "%s", name);
  fake.failure = status;
  fake.spared = spared;
}
void fake_late(int late) { finish_all(), fake.late = late; }
void fake_room(int occupancy, int usable) { fake.occupancy = occupancy, fake.usable = usable; }
int fake_kernels(const char* path) {
  fake.kernels = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  return fake.kernels != NULL;
}
void fake_capture(int capturing) { fake.capturing = capturing; }
const char* fake_log(void) { return fake.log; }
void fake_clear_log(void) { fake.used = 0, fake.log[0] = 0; }
int fake_live(void) { return fake.live; }

/* Contexts. The primary context of device n is the address 0x1000 + n. */

static int device_of(void* context) { return (int)((uintptr_t)context - 0x1000); }
static void* here(void) { return depth ? stack[depth - 1] : NULL; }

int cuInit(unsigned flags) {
  (void)flags;
  CHECK("cuInit");
  note("init");
  return OK;
}
int cuDriverGetVersion(int* version) { return *version = fake.version, OK; }
int cuDeviceGetCount(int* count) {
  CHECK("cuDeviceGetCount");
  *count = fake.devices;
  return fake.devices ? OK : NO_DEVICE;
}
int cuDeviceGet(int* device, int ordinal) {
  if (ordinal >= fake.devices) return 101;
  return *device = ordinal, OK;
}
int cuDeviceGetName(char* name, int size, int device) {
  snprintf(name, (size_t)size, "Fake %d", device);
  return OK;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  int capability = fake.capability[device];
  *value = attribute == 75   ? capability / 10
           : attribute == 76 ? capability % 10
           : attribute < 128 ? fake.attributes[attribute]
                             : 1;
  return OK;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  CHECK("cuDevicePrimaryCtxRetain");
  *context = (void*)(uintptr_t)(0x1000 + device);
  return OK;
}
int cuCtxGetCurrent(void** context) { return *context = here(), OK; }
int cuCtxPushCurrent_v2(void* context) {
  CHECK("cuCtxPushCurrent_v2");
  stack[depth++] = context;
  note("push %d", device_of(context));
  return OK;
}
int cuCtxPopCurrent_v2(void** context) {
  if (!depth) return 201;
  *context = stack[--depth];
  note("pop %d", device_of(*context));
  return OK;
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
  int before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return OK;
}

/* Modules. A module is its image; a function is the name in it. */

int cuModuleLoadDataEx(void** module, const void* image, unsigned count, int* options,
                       void** values) {
  (void)count, (void)options;
  NOT_CAPTURED("cuModuleLoadDataEx");
  if (strcmp(fake.failing, "cuModuleLoadDataEx") == 0) {
    snprintf((char*)values[0], (size_t)(uintptr_t)values[1], "ptxas fatal: fake");
    return fake.failure;
  }
  *module = (void*)image;
  note("load %d mode %d: %.40s", device_of(here()), capture_mode, (const char*)image);
  return here() ? OK : 201;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  (void)module;
  CHECK("cuModuleGetFunction");
  *function = strdup(name);
  note("function %d %s", device_of(here()), name);
  return OK;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  CHECK("cuFuncSetAttribute");
  note("attribute %s %d=%d", (char*)function, attribute, value);
  return OK;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int threads,
                                                size_t shared) {
  (void)function, (void)threads, (void)shared;
  CHECK("cuOccupancyMaxActiveBlocksPerMultiprocessor");
  return *blocks = fake.occupancy, OK;
}
static int launched(const char* how, void* function, const unsigned* sizes, unsigned shared,
                    void* stream, void** args) {
  note("%s %d %s grid %u %u %u block %u %u %u shared %u stream %p", how, device_of(here()),
       (char*)function, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], shared, stream);
  if (!here()) return 201;
  if (fake.kernels) {
    char name[256];
    kernel* run;
    const int* count;
    snprintf(name, sizeof name, "run_%s", (char*)function);
    *(void**)&run = dlsym(fake.kernels, name);
    if (!run) return 500;
    snprintf(name, sizeof name, "count_%s", (char*)function);
    count = dlsym(fake.kernels, name);
    if (fake.late && count) {
      work* made = later(stream);
      made->run = run;
      made->shared = shared;
      memcpy(made->sizes, sizes, sizeof made->sizes);
      for (int i = 0; i < *count; ++i) memcpy(&made->values[i], args[i], sizeof *made->values);
    } else {
      run(args, sizes, shared);
    }
  }
  return OK;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void* stream, void** args, void** extra) {
  const unsigned sizes[6] = {gx, gy, gz, bx, by, bz};
  (void)extra;
  CHECK("cuLaunchKernel");
  return launched("launch", function, sizes, shared, stream, args);
}
int cuLaunchCooperativeKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                              unsigned by, unsigned bz, unsigned shared, void* stream, void** args) {
  const unsigned sizes[6] = {gx, gy, gz, bx, by, bz};
  int usable = fake.usable ? fake.usable : fake.attributes[MULTIPROCESSORS];
  CHECK("cuLaunchCooperativeKernel");
  if (gx * gy * gz > (unsigned)(usable * fake.occupancy)) {
    note("refused %s", (char*)function);
    return TOO_LARGE;
  }
  return launched("together", function, sizes, shared, stream, args);
}

/* Memory. */

int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  void* made;
  CHECK("cuMemAlloc_v2");
  NOT_CAPTURED("cuMemAlloc_v2");
  if (!bytes || !here() || posix_memalign(&made, 256, bytes)) return INVALID;
  memset(made, 0xff, bytes); /* NaN in every type */
  __atomic_add_fetch(&fake.live, 1, __ATOMIC_RELAXED);
  *address = (uint64_t)(uintptr_t)made;
  note("alloc %d %zu", device_of(here()), bytes);
  return OK;
}
int cuMemFree_v2(uint64_t address) {
  CHECK("cuMemFree_v2");
  NOT_CAPTURED("cuMemFree_v2");
  finish_all();
  note("free %d mode %d", device_of(here()), capture_mode);
  __atomic_sub_fetch(&fake.live, 1, __ATOMIC_RELAXED);
  free((void*)(uintptr_t)address);
  return here() ? OK : 201;
}
/* The host's memory may be used again when this returns; the device's is written when it is. */
static int copy_in(uint64_t target, const void* source, size_t bytes, void* stream) {
  if (fake.late && bytes) {
    work* made = later(stream);
    made->target = (void*)(uintptr_t)target;
    made->staged = memcpy(malloc(bytes), source, bytes);
    made->bytes = bytes;
  } else {
    memcpy((void*)(uintptr_t)target, source, bytes);
  }
  return here() ? OK : 201;
}
static int copy_out(void* target, uint64_t source, size_t bytes, void* stream) {
  finish(stream, 0);
  memcpy(target, (void*)(uintptr_t)source, bytes);
  return here() ? OK : 201;
}
int cuMemcpyHtoD_v2(uint64_t target, const void* source, size_t bytes) {
  CHECK("cuMemcpyHtoD_v2");
  NOT_CAPTURED("cuMemcpyHtoD_v2");
  return copy_in(target, source, bytes, NULL);
}
int cuMemcpyDtoH_v2(void* target, uint64_t source, size_t bytes) {
  CHECK("cuMemcpyDtoH_v2");
  NOT_CAPTURED("cuMemcpyDtoH_v2");
  return copy_out(target, source, bytes, NULL);
}
int cuMemcpyHtoDAsync_v2(uint64_t target, const void* source, size_t bytes, void* stream) {
  CHECK("cuMemcpyHtoDAsync_v2");
  return copy_in(target, source, bytes, stream);
}
int cuMemcpyDtoHAsync_v2(void* target, uint64_t source, size_t bytes, void* stream) {
  CHECK("cuMemcpyDtoHAsync_v2");
  return copy_out(target, source, bytes, stream);
}
int cuStreamSynchronize(void* stream) {
  CHECK("cuStreamSynchronize");
  NOT_CAPTURED("cuStreamSynchronize");
  finish(stream, 0);
  return OK;
}
int cuMemPoolCreate(void** pool, const void* properties) {
  const int* words = properties;
  CHECK("cuMemPoolCreate");
  NOT_CAPTURED("cuMemPoolCreate");
  note("pool type %d location %d %d mode %d", words[0], words[2], words[3], capture_mode);
  *pool = (void*)(uintptr_t)(0x2000 + words[3]);
  return OK;
}
int cuMemPoolSetAttribute(void* pool, int attribute, void* value) {
  note("pool %d keeps %d=%llu", (int)((uintptr_t)pool - 0x2000), attribute,
       *(unsigned long long*)value);
  return OK;
}
int cuMemAllocFromPoolAsync(uint64_t* address, size_t bytes, void* pool, void* stream) {
  void* made;
  CHECK("cuMemAllocFromPoolAsync");
  if (!bytes || posix_memalign(&made, 256, bytes)) return INVALID;
  memset(made, 0xff, bytes);
  __atomic_add_fetch(&fake.live, 1, __ATOMIC_RELAXED);
  *address = (uint64_t)(uintptr_t)made;
  note("workspace %d %zu stream %p", (int)((uintptr_t)pool - 0x2000), bytes, stream);
  return OK;
}
int cuMemFreeAsync(uint64_t address, void* stream) {
  CHECK("cuMemFreeAsync");
  note("release stream %p", stream);
  __atomic_sub_fetch(&fake.live, 1, __ATOMIC_RELAXED);
  if (fake.late) {
    later(stream)->target = (void*)(uintptr_t)address;
  } else {
    free((void*)(uintptr_t)address);
  }
  return OK;
}

/* Errors. */

int cuGetErrorName(int status, const char** name) {
  *name = status == 3     ? "CUDA_ERROR_NOT_INITIALIZED"
          : status == 100 ? "CUDA_ERROR_NO_DEVICE"
          : status == NO_IMAGE ? "CUDA_ERROR_NO_BINARY_FOR_GPU"
          : status == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS"
          : status == TOO_LARGE ? "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"
          : status == CAPTURE_UNSUPPORTED ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
                          : "CUDA_ERROR_FAKE";
  return OK;
}
int cuGetErrorString(int status, const char** text) {
  (void)status;
  *text = "a fake failure";
  return OK;
}
