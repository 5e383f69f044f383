/* Calls functions of a kernel library with arrays from a file, on a machine without Python.
 *
 * usage: host LIBRARY CALLS RESULTS
 * CALLS holds, for each call and without padding: int32 length of the name, the name, int64
 * request, int32 number of arrays, int32 how many of these, the last ones, are outputs; for each
 * array int32 DLPack type code, int32 bits, int32 rank, int64 bytes, int64 extents, its content.
 * RESULTS gets the content of the outputs. An array is aligned to its elements and no better, and
 * lies between bytes that must not change.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

enum { MOST_ARRAYS = 16, MOST_DIMS = 8, MARGIN = 512, MARK = 0xA5 };

static FILE* calls;

static void fail(const char* what, const char* detail) {
  fprintf(stderr, "%s: %s\n", what, detail ? detail : "");
  exit(1);
}

static void take(void* into, size_t bytes) {
  if (fread(into, 1, bytes, calls) != bytes) fail("the calls end early", NULL);
}

static int32_t take32(void) {
  int32_t value;
  take(&value, sizeof value);
  return value;
}

static int64_t take64(void) {
  int64_t value;
  take(&value, sizeof value);
  return value;
}

/* What a library needs of tvm-ffi. */
void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; ++i) fputs(parts[i], stderr);
  fputc('\n', stderr);
}

typedef struct {
  DLTensor tensor;
  int64_t shape[MOST_DIMS];
  unsigned char* memory; /* MARGIN, the content, MARGIN */
  size_t bytes;
} array;

static void take_array(array* it) {
  it->tensor.dtype.code = (uint8_t)take32();
  it->tensor.dtype.bits = (uint8_t)take32();
  it->tensor.dtype.lanes = 1;
  it->tensor.ndim = take32();
  it->bytes = (size_t)take64();
  if (it->tensor.ndim > MOST_DIMS) fail("too many dimensions", NULL);
  for (int i = 0; i < it->tensor.ndim; ++i) it->shape[i] = take64();
  size_t item = it->tensor.dtype.bits / 8;
  void* whole = NULL;
  if (posix_memalign(&whole, 64, it->bytes + 2 * MARGIN + item)) fail("no memory", NULL);
  it->memory = (unsigned char*)whole + item;
  memset(it->memory, MARK, it->bytes + 2 * MARGIN);
  take(it->memory + MARGIN, it->bytes);
  it->tensor.data = it->memory + MARGIN;
  it->tensor.device.device_type = kDLCPU;
  it->tensor.device.device_id = 0;
  it->tensor.shape = it->shape;
  it->tensor.strides = NULL;
  it->tensor.byte_offset = 0;
}

static void check_margins(const array* it, const char* name) {
  for (size_t i = 0; i < MARGIN; ++i)
    if (it->memory[i] != MARK || it->memory[MARGIN + it->bytes + i] != MARK)
      fail("bytes beside an array were written", name);
}

int main(int argc, char** argv) {
  if (argc != 4) fail("usage", "host LIBRARY CALLS RESULTS");
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) fail("dlopen", dlerror());
  calls = fopen(argv[2], "rb");
  FILE* results = fopen(argv[3], "wb");
  if (!calls || !results) fail("cannot open", argv[2]);
  for (int first; (first = fgetc(calls)) != EOF;) {
    ungetc(first, calls);
    char name[128] = "__tvm_ffi_";
    int32_t length = take32();
    if (length <= 0 || length > 100) fail("a name is too long", NULL);
    take(name + strlen("__tvm_ffi_"), (size_t)length);
    int64_t request = take64();
    int32_t count = take32(), outputs = take32();
    static array arrays[MOST_ARRAYS];
    static TVMFFIAny arguments[MOST_ARRAYS + 1];
    if (count > MOST_ARRAYS) fail("too many arrays", name);
    memset(arguments, 0, sizeof arguments);
    for (int32_t i = 0; i < count; ++i) {
      take_array(&arrays[i]);
      arguments[i].type_index = kTVMFFIDLTensorPtr;
      arguments[i].v_ptr = &arrays[i].tensor;
    }
    arguments[count].type_index = kTVMFFIInt;
    arguments[count].v_int64 = request;
    TVMFFISafeCallType function = (TVMFFISafeCallType)dlsym(library, name);
    if (!function) fail("there is no", name);
    TVMFFIAny result;
    memset(&result, 0, sizeof result);
    if (function(NULL, arguments, count + 1, &result)) fail("failed", name);
    for (int32_t i = 0; i < count; ++i) {
      check_margins(&arrays[i], name);
      if (i >= count - outputs) fwrite(arrays[i].tensor.data, 1, arrays[i].bytes, results);
      free(arrays[i].memory - arrays[i].tensor.dtype.bits / 8);
    }
  }
  return fclose(results) ? 1 : 0;
}
