/* The CUDA driver, opened at the first call, and this library's code, loaded once a device.
 *
 * Code on a device is never unloaded: a captured graph may launch it after the library is gone.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

#include "cuda_launcher.h"

driver_api normgraph_cu;
pthread_mutex_t normgraph_lock = PTHREAD_MUTEX_INITIALIZER;
_Thread_local int normgraph_device = -1;

enum { MOST_DEVICES = 256 };
static device* devices[MOST_DEVICES];

static const struct {
  const char* name;
  void* entry;
} imports[] = {
    {"cuInit", &normgraph_cu.init},
    {"cuDriverGetVersion", &normgraph_cu.driver_version},
    {"cuDeviceGet", &normgraph_cu.device_get},
    {"cuDeviceGetAttribute", &normgraph_cu.device_attribute},
    {"cuDevicePrimaryCtxRetain", &normgraph_cu.context_retain},
    {"cuCtxGetCurrent", &normgraph_cu.context_current},
    {"cuCtxPushCurrent_v2", &normgraph_cu.context_push},
    {"cuCtxPopCurrent_v2", &normgraph_cu.context_pop},
    {"cuModuleLoadDataEx", &normgraph_cu.module_load},
    {"cuModuleGetFunction", &normgraph_cu.module_function},
    {"cuFuncSetAttribute", &normgraph_cu.function_attribute},
    {"cuOccupancyMaxActiveBlocksPerMultiprocessor", &normgraph_cu.occupancy},
    {"cuLaunchKernel", &normgraph_cu.launch},
    {"cuLaunchCooperativeKernel", &normgraph_cu.launch_together},
    {"cuGetErrorName", &normgraph_cu.error_name},
    {"cuGetErrorString", &normgraph_cu.error_string},
    {"cuThreadExchangeStreamCaptureMode", &normgraph_cu.exchange_capture_mode},
    {"cuMemPoolCreate", &normgraph_cu.pool_create},
    {"cuMemPoolSetAttribute", &normgraph_cu.pool_set},
    {"cuMemAllocFromPoolAsync", &normgraph_cu.pool_alloc},
    {"cuMemFreeAsync", &normgraph_cu.pool_free},
};

int normgraph_fail(const char* text) {
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", text);
  return -1;
}

int normgraph_failed(status code, const char* doing) {
  const char *name = NULL, *words = NULL;
  char text[768];
  if (normgraph_cu.error_name(code, &name) || !name) name = "an unknown error";
  if (normgraph_cu.error_string(code, &words) || !words) words = "";
  snprintf(text, sizeof text, "CUDA device %d: %s: %s (%d) %s%s", normgraph_device, doing, name, code, words,
           code == NOT_INITIALIZED
               ? ". A process forked after CUDA was used cannot use it; start it with spawn"
               : "");
  return normgraph_fail(text);
}

static int open_driver(void) {
  static int opened = 0;
  const char* path = getenv("NORMGRAPH_LIBCUDA");
  char text[768];
  void* library;
  status code;
  if (opened) return 0;
  library = dlopen(path && *path ? path : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    snprintf(text, sizeof text, "there is no CUDA driver here: %s", dlerror());
    return normgraph_fail(text);
  }
  for (size_t i = 0; i < sizeof imports / sizeof *imports; ++i) {
    void* found = dlsym(library, imports[i].name);
    if (!found) {
      snprintf(text, sizeof text, "the CUDA driver has no %s: it is too old, CUDA 12 is needed",
               imports[i].name);
      return normgraph_fail(text);
    }
    memcpy(imports[i].entry, &found, sizeof found);
  }
  code = normgraph_cu.init(0);
  if (code) return normgraph_failed(code, "cuInit");
  opened = 1;
  return 0;
}

/* The image a device of this capability runs best: machine code of its own major version, else PTX. */
static const normgraph_image* image_for(int capability) {
  const normgraph_image* best = NULL;
  for (int i = 0; i < normgraph_image_count; ++i) {
    const normgraph_image* each = &normgraph_images[i];
    if (each->capability > capability) continue;
    if (!each->ptx && each->capability / 10 != capability / 10) continue;
    if (!best || (best->ptx && !each->ptx) ||
        (best->ptx == each->ptx && best->capability < each->capability)) {
      best = each;
    }
  }
  return best;
}

static int load_functions(device* made, int capability) {
  const normgraph_image* image = image_for(capability);
  char text[1536], log[1024] = "";
  int options[] = {JIT_LOG, JIT_LOG_BYTES};
  void* values[] = {log, (void*)(uintptr_t)sizeof log};
  module loaded;
  status code;
  if (!image) {
    snprintf(text, sizeof text,
             "CUDA device %d is sm_%d, and the library holds code for %s. Compile the artifact for "
             "a target this device runs",
             normgraph_device, capability, normgraph_image_names);
    return normgraph_fail(text);
  }
  code = normgraph_cu.module_load(&loaded, image->data, 2, options, values);
  if (code) {
    snprintf(text, sizeof text, "loading code for %s%d%s%s", image->ptx ? "compute_" : "sm_",
             image->capability, *log ? ": " : "", log);
    return normgraph_failed(code, text);
  }
  for (int i = 0; i < normgraph_kernel_count; ++i) {
    code = normgraph_cu.module_function(&made->functions[i], loaded, normgraph_kernels[i].name);
    if (code) return normgraph_failed(code, normgraph_kernels[i].name);
  }
  return 0;
}

static int load_on(device* made) {
  int handle, major, minor, result;
  context popped;
  status code;
  if ((code = normgraph_cu.device_get(&handle, normgraph_device)) ||
      (code = normgraph_cu.device_attribute(&major, ATTR_MAJOR, handle)) ||
      (code = normgraph_cu.device_attribute(&minor, ATTR_MINOR, handle)) ||
      (code = normgraph_cu.context_retain(&made->primary, handle)) ||
      (code = normgraph_cu.context_push(made->primary))) {
    return normgraph_failed(code, "opening the device");
  }
  result = load_functions(made, 10 * major + minor);
  normgraph_cu.context_pop(&popped);
  return result;
}

device* normgraph_loaded(void) {
  device* made;
  int mode = CAPTURE_RELAXED, result;
  if (normgraph_device < 0 || normgraph_device >= MOST_DEVICES) {
    normgraph_fail("no CUDA device of that number can be used");
    return NULL;
  }
  made = __atomic_load_n(&devices[normgraph_device], __ATOMIC_ACQUIRE);
  if (made) return made;
  pthread_mutex_lock(&normgraph_lock);
  made = devices[normgraph_device];
  if (!made && !open_driver()) {
    made = calloc(1, sizeof *made);
    if (made) made->functions = calloc(normgraph_kernel_count + 1, sizeof *made->functions);
    if (made) made->dynamic_shared = calloc(normgraph_kernel_count + 1, sizeof(int));
    if (!made || !made->functions || !made->dynamic_shared) abort();
    /* Loading is nothing a graph could capture, and does not disturb a capture that is under way. */
    normgraph_cu.exchange_capture_mode(&mode);
    result = load_on(made);
    normgraph_cu.exchange_capture_mode(&mode);
    if (result) {
      free(made->functions);
      free(made->dynamic_shared);
      free(made);
      made = NULL;
    } else {
      __atomic_store_n(&devices[normgraph_device], made, __ATOMIC_RELEASE);
    }
  }
  pthread_mutex_unlock(&normgraph_lock);
  return made;
}

device* normgraph_opened(void) { return devices[normgraph_device]; }

int normgraph_enter(device* here, int* pushed) {
  context now = NULL;
  status code = normgraph_cu.context_current(&now);
  if (!code && now != here->primary) {
    code = normgraph_cu.context_push(here->primary);
    *pushed = !code;
  }
  return code ? normgraph_failed(code, "selecting the device") : 0;
}

void normgraph_leave(int pushed) {
  context popped;
  if (pushed) normgraph_cu.context_pop(&popped);
}

