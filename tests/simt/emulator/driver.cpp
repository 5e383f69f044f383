// The part of the CUDA driver's API that launchers use, with the emulator as the device, and what
// tests need beside it. A module's image is the path of a program.

#include <algorithm>
#include <cstring>
#include <map>

#include "engine.h"

namespace {

enum { SUCCESS, INVALID_VALUE = 1, INVALID_IMAGE = 200, NOT_FOUND = 500, LAUNCH_FAILED = 719 };
enum { MAJOR = 75, MINOR = 76, POOLS = 115, MAX_DYNAMIC_SHARED = 8, SHARED_CARVEOUT = 9 };
enum { MULTIPROCESSORS = 16, THREADS_HERE = 39, SHARED_HERE = 81, COOPERATIVE = 95 };
enum { SHARED_OF_A_BLOCK = 97, SHARED_RESERVED = 111, TOO_LARGE = 720 };
constexpr int USUAL_SHARED = 48 * 1024, KILO = 1024;

std::map<const simt::Kernel*, int> allowed_shared;
std::vector<void*> contexts;
int one_context, one_pool;
unsigned allocations = 0, multiprocessors = 0;
int shared_here = 0;
std::string launched, allocated;  // what a request to run the same again would say

template <class T>
T read(const void* at) {
  T value;
  memcpy(&value, at, sizeof value);
  return value;
}

simt::Value value_of(char kind, const void* at) {
  simt::Value value = {};
  if (kind == 'p') {
    value.kind = simt::Value::pointer;
    value.address = read<void*>(at);
  } else if (kind == 'f' || kind == 'd') {
    value.kind = simt::Value::real;
    value.fraction = kind == 'f' ? static_cast<double>(read<float>(at)) : read<double>(at);
  } else {
    value.kind = simt::Value::integer;
    value.whole = kind == 'b'   ? read<int8_t>(at)
                  : kind == 'h' ? read<int16_t>(at)
                  : kind == 'i' ? read<int32_t>(at)
                                : read<int64_t>(at);
  }
  return value;
}

int allocate(uint64_t* address, size_t size) {
  std::string name = simt::format("memory%u", allocations++);
  *address = simt::allocate(name, simt::Role::scratch, size, 2, 256)->base;
  allocated += simt::format("%s %zu\n", name.c_str(), size);
  return SUCCESS;
}

void note(const simt::Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  launched += simt::format("%s %u %u %u %u %u %u %zu", launch.kernel->name, grid.x, grid.y, grid.z,
                           block.x, block.y, block.z, launch.dynamic_shared);
  if (launch.cooperative) launched += " together:";
  for (const simt::Value& arg : launch.args) {
    auto address = reinterpret_cast<uintptr_t>(arg.address);
    const simt::Region* array = simt::region_at(address);
    if (arg.kind == simt::Value::pointer && array)
      launched += simt::format(" a:%s+%zu", array->name.c_str(), address - array->base);
    else if (arg.kind == simt::Value::pointer)
      launched += " n:";
    else if (arg.kind == simt::Value::integer)
      launched += simt::format(" i:%lld", static_cast<long long>(arg.whole));
    else
      launched += simt::format(" f:%a", arg.fraction);
  }
  launched += "\n";
}

int launch_it(void* function, dim3 grid, dim3 block, unsigned shared, bool together,
              void** params) {
  simt::Launch launch;
  launch.kernel = static_cast<const simt::Kernel*>(function);
  launch.grid = grid;
  launch.block = block;
  launch.dynamic_shared = shared;
  launch.cooperative = together;
  auto allowed = allowed_shared.find(launch.kernel);
  if (shared > USUAL_SHARED &&
      (allowed == allowed_shared.end() || static_cast<int>(shared) > allowed->second))
    return INVALID_VALUE;
  for (unsigned i = 0; i < launch.kernel->parameters; ++i)
    launch.args.push_back(value_of(launch.kernel->kinds[i], params[i]));
  note(launch);
  return simt::run(launch) ? SUCCESS : LAUNCH_FAILED;
}

int give_back(uint64_t address) {
  simt::Region* region = simt::region_at(address);
  if (!region || region->base != address) return INVALID_VALUE;
  simt::give_back(*region);
  return SUCCESS;
}

}  // namespace

extern "C" {

int cuInit(unsigned) { return SUCCESS; }
int cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
int cuDeviceGetCount(int* count) { return *count = 1, SUCCESS; }
int cuDeviceGet(int* device, int index) { return *device = index, index ? INVALID_VALUE : SUCCESS; }
int cuDeviceGetName(char* name, int size, int) {
  snprintf(name, static_cast<size_t>(size), "SIMT emulator");
  return SUCCESS;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case MAJOR: *value = 9; break;
    case MULTIPROCESSORS: *value = static_cast<int>(multiprocessors); break;
    case THREADS_HERE: *value = 2048; break;
    case SHARED_HERE: *value = shared_here; break;
    case SHARED_OF_A_BLOCK: *value = 227 * KILO; break;
    case SHARED_RESERVED: *value = KILO; break;
    case COOPERATIVE: *value = multiprocessors > 0; break;
    default: *value = attribute == POOLS;
  }
  return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &one_context, SUCCESS; }
int cuCtxGetCurrent(void** context) {
  *context = contexts.empty() ? nullptr : contexts.back();
  return SUCCESS;
}
int cuCtxPushCurrent_v2(void* context) { return contexts.push_back(context), SUCCESS; }
int cuCtxPopCurrent_v2(void** context) {
  if (contexts.empty()) return INVALID_VALUE;
  *context = contexts.back();
  contexts.pop_back();
  return SUCCESS;
}
int cuCtxSynchronize() { return SUCCESS; }
int cuStreamSynchronize(void*) { return SUCCESS; }
int cuThreadExchangeStreamCaptureMode(int*) { return SUCCESS; }
int cuGetErrorName(int status, const char** name) {
  *name = status == LAUNCH_FAILED ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR";
  return SUCCESS;
}
int cuGetErrorString(int, const char** text) {
  *text = "the emulator reported a defect or an argument that is not valid";
  return SUCCESS;
}

int cuModuleLoadDataEx(void** module, const void* image, unsigned, int*, void**) {
  const simt::Kernel* first = simt::load_program(static_cast<const char*>(image));
  *module = const_cast<simt::Kernel*>(first);
  return first ? SUCCESS : INVALID_IMAGE;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  const simt::Kernel* found = simt::kernel_named(static_cast<const simt::Kernel*>(module), name);
  *function = const_cast<simt::Kernel*>(found);
  return found ? SUCCESS : NOT_FOUND;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute == SHARED_CARVEOUT) return SUCCESS;
  if (attribute != MAX_DYNAMIC_SHARED) return INVALID_VALUE;
  allowed_shared[static_cast<const simt::Kernel*>(function)] = value;
  return SUCCESS;
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int threads, size_t shared) {
  *blocks = std::min(2048 / threads, shared_here / static_cast<int>(shared + KILO));
  return SUCCESS;
}

int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void*, void** params, void**) {
  return launch_it(function, {gx, gy, gz}, {bx, by, bz}, shared, false, params);
}

int cuLaunchCooperativeKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                              unsigned by, unsigned bz, unsigned shared, void*, void** params) {
  unsigned threads = bx * by * bz, here = static_cast<unsigned>(shared_here) / (shared + KILO);
  if (2048 / threads < here) here = 2048 / threads;
  if (gx * gy * gz > multiprocessors * here) return TOO_LARGE;
  return launch_it(function, {gx, gy, gz}, {bx, by, bz}, shared, true, params);
}

int cuMemAlloc_v2(uint64_t* address, size_t size) { return allocate(address, size); }
int cuMemFree_v2(uint64_t address) { return give_back(address); }
int cuMemPoolCreate(void** pool, const void*) { return *pool = &one_pool, SUCCESS; }
int cuMemPoolSetAttribute(void*, int, void*) { return SUCCESS; }
int cuMemAllocFromPoolAsync(uint64_t* address, size_t size, void*, void*) {
  return allocate(address, size);
}
int cuMemFreeAsync(uint64_t address, void*) { return give_back(address); }
int cuMemcpyHtoD_v2(uint64_t address, const void* from, size_t size) {
  simt::Region* region = simt::region_at(address);
  if (!region || address - region->base + size > region->size) return INVALID_VALUE;
  memcpy(reinterpret_cast<void*>(address), from, size);
  for (size_t at = 0; at < size; ++at)
    region->written[(address - region->base + at) / region->granule] = 1;
  return SUCCESS;
}
int cuMemcpyDtoH_v2(void* to, uint64_t address, size_t size) {
  simt::Region* region = simt::region_at(address);
  if (!region || address - region->base + size > region->size) return INVALID_VALUE;
  memcpy(to, reinterpret_cast<void*>(address), size);
  return SUCCESS;
}

int cuMemcpyHtoDAsync_v2(uint64_t address, const void* from, size_t size, void*) {
  return cuMemcpyHtoD_v2(address, from, size);
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t address, size_t size, void*) {
  return cuMemcpyDtoH_v2(to, address, size);
}

// What tests call.

void simt_begin(unsigned seed) {
  simt::arena_clear();
  simt::clear_findings();
  simt::randomness.seed(seed);
  allocations = 0;
  launched = allocated = "";
}

// Multiprocessors from now on, and the shared memory of each. None, as at first: no grid is launched
// together.
void simt_device(unsigned count, int bytes) {
  multiprocessors = count;
  shared_here = bytes;
}

// role: 0 input, 1 output, 2 update, 3 scratch; data: NULL leaves the array unwritten.
uint64_t simt_allocate(const char* name, int role, size_t size, unsigned granule,
                       unsigned misalignment, const void* data) {
  simt::Region* made =
      simt::allocate(name, static_cast<simt::Role>(role), size, granule, 256 + misalignment);
  if (data) simt::fill(*made, data);
  return made->base;
}

// The findings, what was allocated, and the launches; a line of dashes between them.
int simt_finish(const char* path) {
  simt::check_outputs();
  FILE* file = fopen(path, "wb");
  if (!file) return 1;
  simt::write_findings(file);
  fprintf(file, "---\n%s---\n%s", allocated.c_str(), launched.c_str());
  return fclose(file);
}
}
