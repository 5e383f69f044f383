// The functions that the compiler's instrumentation calls.
//
// Kernels are compiled with -fsanitize=thread and -fsanitize=alignment,bounds, but linked with these
// in place of the sanitizers' libraries: each load and store comes here with its address and size
// before it happens.

#include <cstring>

#include "engine.h"

extern "C" {

#define SIMT_HOOK(name, size, write)                                                    \
  void name(void* address) {                                                            \
    simt::access(reinterpret_cast<uintptr_t>(address), size, write,                     \
                 __builtin_return_address(0));                                          \
  }
// Volatile accesses go from block to block without a barrier: see `volatile_access`.
#define SIMT_VOLATILE(name, size, write)                                                \
  void name(void* address) {                                                            \
    simt::volatile_access(reinterpret_cast<uintptr_t>(address), size, write,            \
                          __builtin_return_address(0));                                 \
  }
#define SIMT_HOOKS(size)                              \
  SIMT_HOOK(__tsan_read##size, size, false)           \
  SIMT_HOOK(__tsan_write##size, size, true)           \
  SIMT_HOOK(__tsan_unaligned_read##size, size, false) \
  SIMT_HOOK(__tsan_unaligned_write##size, size, true) \
  SIMT_VOLATILE(__tsan_volatile_read##size, size, false)  \
  SIMT_VOLATILE(__tsan_volatile_write##size, size, true)
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)

void __tsan_read_range(void* address, size_t size) {
  simt::access(reinterpret_cast<uintptr_t>(address), size, false, __builtin_return_address(0));
}

void __tsan_write_range(void* address, size_t size) {
  simt::access(reinterpret_cast<uintptr_t>(address), size, true, __builtin_return_address(0));
}

// What clang calls for whole objects.
void* __tsan_memcpy(void* to, const void* from, size_t size) {
  __tsan_read_range(const_cast<void*>(from), size);
  __tsan_write_range(to, size);
  return memcpy(to, from, size);
}

void* __tsan_memmove(void* to, const void* from, size_t size) {
  __tsan_read_range(const_cast<void*>(from), size);
  __tsan_write_range(to, size);
  return memmove(to, from, size);
}

void* __tsan_memset(void* to, int value, size_t size) {
  __tsan_write_range(to, size);
  return memset(to, value, size);
}

void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct TypeName {
  uint16_t kind, info;
  char name[1];
};
struct Mismatch {
  SourceLocation location;
  const TypeName* type;
  unsigned char log_alignment, check;
};
struct OutOfBounds {
  SourceLocation location;
  const TypeName *array, *index;
};

// A device faults here, and this host may: the run ends.
void __ubsan_handle_type_mismatch_v1(Mismatch* data, uintptr_t address) {
  if (!simt::current) return;
  simt::report("misaligned", data->type->name,
               simt::format("%s at an address that is %u modulo %u", data->type->name,
                            static_cast<unsigned>(address % (1u << data->log_alignment)),
                            1u << data->log_alignment),
               static_cast<int>(data->location.line));
  simt::abandon();
}

void __ubsan_handle_out_of_bounds(OutOfBounds* data, uintptr_t index) {
  simt::report("out-of-bounds", data->array->name,
               simt::format("index %ld of %s", static_cast<long>(static_cast<int32_t>(index)),
                            data->array->name),
               static_cast<int>(data->location.line));
}
}
