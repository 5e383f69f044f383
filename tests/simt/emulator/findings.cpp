// What a run has to report: each kind of finding once a place, with a count.

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <map>
#include <tuple>

#include "engine.h"

namespace simt {

namespace {

struct Finding {
  std::string text;
  long count = 0;
};

constexpr size_t MOST = 200;  // places; a broken kernel has the same few
std::map<std::tuple<std::string, std::string, int, const void*>, Finding> findings;

}  // namespace

std::string format(const char* text, ...) {
  char line[512];
  va_list args;
  va_start(args, text);
  vsnprintf(line, sizeof line, text, args);
  va_end(args);
  return line;
}

void report(const char* kind, const std::string& where, const std::string& text, int line,
            const void* pc) {
  auto key = std::make_tuple(std::string(kind), where, line, pc);
  if (findings.size() >= MOST && !findings.count(key)) return;
  Finding& finding = findings[key];
  if (finding.count++ == 0) finding.text = text;
}

// A finding a line: kind, line of the source, else an address in the program, count, text, program.
void write_findings(FILE* file) {
  for (const auto& [key, finding] : findings) {
    const char* pc = static_cast<const char*>(std::get<3>(key));
    Dl_info info = {};
    if (pc) dladdr(pc, &info);
    fprintf(file, "%s\t%d\t%zx\t%ld\t%s\n", std::get<0>(key).c_str(), std::get<2>(key),
            static_cast<size_t>(pc - static_cast<char*>(info.dli_fbase)), finding.count,
            finding.text.c_str());
  }
}

void clear_findings() { findings.clear(); }

std::string thread_name(uint32_t thread_in_grid) {
  unsigned in_block = threads_per_block();
  return format("thread %u of block %u", thread_in_grid % in_block, thread_in_grid / in_block);
}

}  // namespace simt
