// Reads a request (arrays and launches), runs it, and writes the arrays and the findings.
//
//   seed N
//   array NAME ROLE BYTES GRANULE MISALIGNMENT
//   launch KERNEL gx gy gz bx by bz cx cy cz SHARED COOPERATIVE ARGUMENTS
//   a INDEX BYTES | n | i INTEGER | f REAL                 one line an argument
//   end, then the bytes of all arrays

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unistd.h>

#include "engine.h"

namespace {

const simt::Kernel* kernels = nullptr;
std::vector<simt::Region*> arrays;
std::vector<simt::Launch> launches;
const char* output_path;

[[noreturn]] void refuse(const std::string& why) {
  fprintf(stderr, "%s\n", why.c_str());
  exit(3);
}

void write_results() {
  FILE* file = fopen(output_path, "wb");
  if (!file) refuse("cannot write the results");
  simt::write_findings(file);
  fputs("end\n", file);
  for (const simt::Region* array : arrays)
    fwrite(reinterpret_cast<void*>(array->base), 1, array->size, file);
  fclose(file);
}

void crashed(int signal) {
  const char* name = signal == SIGFPE ? "an integer divided by zero" : "a fault of the host";
  simt::report("crash", name, name, 0);
  write_results();
  _exit(0);
}

simt::Role role_of(const std::string& name) {
  if (name == "input") return simt::Role::input;
  if (name == "output") return simt::Role::output;
  if (name == "update") return simt::Role::update;
  if (name == "scratch") return simt::Role::scratch;
  refuse("no such role: " + name);
}

simt::Value read_argument(FILE* file) {
  char kind;
  simt::Value value = {};
  if (fscanf(file, " %c", &kind) != 1) refuse("an argument is missing");
  size_t index = 0, offset = 0;
  long long whole = 0;
  value.kind = kind == 'i' ? simt::Value::integer
               : kind == 'f' ? simt::Value::real : simt::Value::pointer;
  bool read = kind == 'n' || (kind == 'a' && fscanf(file, "%zu %zu", &index, &offset) == 2) ||
              (kind == 'i' && fscanf(file, "%lld", &whole) == 1) ||
              (kind == 'f' && fscanf(file, "%lf", &value.fraction) == 1);
  if (!read) refuse("an argument cannot be read");
  value.whole = whole;
  if (kind == 'a') value.address = reinterpret_cast<void*>(arrays.at(index)->base + offset);
  return value;
}

void read_launch(FILE* file) {
  char name[512];
  simt::Launch made;
  int cooperative;
  unsigned count;
  unsigned sizes[9];
  if (fscanf(file, "%511s", name) != 1) refuse("a launch has no name");
  for (unsigned& size : sizes)
    if (fscanf(file, "%u", &size) != 1) refuse("a launch has no size");
  if (fscanf(file, "%zu %d %u", &made.dynamic_shared, &cooperative, &count) != 3)
    refuse("a launch is not complete");
  made.grid = {sizes[0], sizes[1], sizes[2]};
  made.block = {sizes[3], sizes[4], sizes[5]};
  made.cluster = {sizes[6], sizes[7], sizes[8]};
  made.cooperative = cooperative;
  made.kernel = simt::kernel_named(kernels, name);
  if (!made.kernel) refuse(std::string("no kernel of that name: ") + name);
  if (made.kernel->parameters != count)
    refuse(simt::format("%s takes %u arguments, %u came", name, made.kernel->parameters, count));
  for (unsigned i = 0; i < count; ++i) {
    made.args.push_back(read_argument(file));
    const char* fitting[] = {"p", "bhil", "fd"};
    if (!strchr(fitting[made.args[i].kind], made.kernel->kinds[i]))
      refuse(simt::format("%s: argument %u is of another kind", name, i));
  }
  launches.push_back(made);
}

void read_request(const char* path) {
  FILE* file = fopen(path, "rb");
  if (!file) refuse("cannot read the request");
  char word[512];
  while (fscanf(file, "%511s", word) == 1 && strcmp(word, "end")) {
    unsigned seed, granule, misalignment;
    size_t size;
    char role[16];
    if (!strcmp(word, "seed") && fscanf(file, "%u", &seed) == 1) {
      simt::randomness.seed(seed);
    } else if (!strcmp(word, "array") && fscanf(file, "%511s %15s %zu %u %u", word, role, &size,
                                                &granule, &misalignment) == 5) {
      arrays.push_back(simt::allocate(word, role_of(role), size, granule, misalignment));
    } else if (!strcmp(word, "launch")) {
      read_launch(file);
    } else {
      refuse(std::string("not understood: ") + word);
    }
  }
  fgetc(file);
  for (simt::Region* array : arrays) {
    bool given = array->role == simt::Role::input || array->role == simt::Role::update;
    if (!given) continue;
    std::vector<char> data(array->size);
    if (fread(data.data(), 1, array->size, file) != array->size)
      refuse("the bytes of an array are missing");
    simt::fill(*array, data.data());
  }
  fclose(file);
}

void catch_faults() {
  static char stack[64 * 1024];
  stack_t own = {};
  own.ss_sp = stack;
  own.ss_size = sizeof stack;
  sigaltstack(&own, nullptr);
  struct sigaction action = {};
  action.sa_handler = crashed;
  action.sa_flags = SA_ONSTACK | SA_RESETHAND;
  for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigaction(signal, &action, nullptr);
}

}  // namespace

int main(int count, char** words) {
  if (count != 4) refuse("usage: runner PROGRAM REQUEST RESULTS");
  kernels = simt::load_program(words[1]);
  output_path = words[3];
  read_request(words[2]);
  catch_faults();
  bool complete = true;
  for (simt::Launch& each : launches) complete = complete && simt::run(each);
  if (complete) simt::check_outputs();
  write_results();
}
