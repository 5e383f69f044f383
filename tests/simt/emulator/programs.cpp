// Programs are shared libraries that register their kernels as they are loaded.

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <string>

#include "engine.h"

namespace simt {

namespace {

const Kernel* registered = nullptr;
std::map<std::string, const Kernel*> programs;  // the first kernel of each

}  // namespace

void register_kernel(Kernel* kernel) {
  kernel->next = registered;
  registered = kernel;
}

const Kernel* load_program(const char* path) {
  auto known = programs.find(path);
  if (known != programs.end()) return known->second;
  registered = nullptr;
  if (!dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
    fprintf(stderr, "%s\n", dlerror());
    return nullptr;
  }
  return programs[path] = registered;
}

const Kernel* kernel_named(const Kernel* first, const char* name) {
  while (first && strcmp(first->name, name)) first = first->next;
  return first;
}

}  // namespace simt
