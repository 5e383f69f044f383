/* How many threads to use: NORMGRAPH_NUM_THREADS, or what this process may use of the machine. */
#define _GNU_SOURCE
#include "backend.h"

#include <dirent.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A whole number at `*text`, which moves behind it; -1 where there is none. */
static long long number(const char** text) {
  if (**text < '0' || **text > '9') return -1;
  long long value = 0;
  for (; **text >= '0' && **text <= '9'; ++*text) {
    if (value < 1000000000000000LL) value = value * 10 + (**text - '0');
  }
  return value;
}

/* The CPUs that any thread of the process may use. A thread pool that binds threads, such as
 * OpenMP's, may have bound the calling one to a single CPU. */
int cpus_of_process(cpu_mask* mask) {
  memset(mask, 0, sizeof *mask);
  cpu_mask one;
  DIR* tasks = opendir("/proc/self/task");
  for (struct dirent* entry; tasks && (entry = readdir(tasks));) {
    const char* name = entry->d_name;
    long long thread = number(&name);
    if (thread <= 0) continue;
    memset(&one, 0, sizeof one);
    if (sched_getaffinity((pid_t)thread, sizeof one, (cpu_set_t*)&one) != 0) continue;
    for (size_t i = 0; i < sizeof one.words / sizeof *one.words; ++i) {
      mask->words[i] |= one.words[i];
    }
  }
  if (tasks) closedir(tasks);
  int count = CPU_COUNT_S(sizeof *mask, (cpu_set_t*)mask);
  if (count == 0 && sched_getaffinity(0, sizeof *mask, (cpu_set_t*)mask) == 0) {
    count = CPU_COUNT_S(sizeof *mask, (cpu_set_t*)mask);
  }
  return count > 0 ? count : 1;
}

/* The first bytes of a file as text; false where there is no such file. */
static bool read_text(const char* path, char* text, size_t size) {
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  size_t length = 0;
  for (ssize_t got; length < size - 1; length += (size_t)got) {
    got = read(file, text + length, size - 1 - length);
    if (got <= 0) break;
  }
  close(file);
  text[length] = 0;
  return true;
}

static int rounded_up(const char* quota, const char* period) {
  long long of = number(&quota), in = number(&period);
  if (of <= 0 || in <= 0) return 0; /* "max" and -1 set no limit */
  long long cpus = (of + in - 1) / in;
  return cpus > MOST_THREADS ? 0 : (int)cpus;
}

/* The limit that one group sets, 0 for none. */
static int limit_of(const char* group, bool second) {
  char path[4200], quota[64], period[64];
  if (second) {
    snprintf(path, sizeof path, "%s/cpu.max", group);
    if (!read_text(path, quota, sizeof quota)) return 0;
    const char* space = strchr(quota, ' ');
    return space ? rounded_up(quota, space + 1) : 0;
  }
  snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", group);
  if (!read_text(path, quota, sizeof quota)) return 0;
  snprintf(path, sizeof path, "%s/cpu.cfs_period_us", group);
  return read_text(path, period, sizeof period) ? rounded_up(quota, period) : 0;
}

static int smaller(int a, int b) { return a && (!b || a < b) ? a : b; }

/* The limits of a group and of all above it. Of a container's group the host's path may be all that
 * is known, and the group itself is then what is mounted at the top. */
static int limit_from(const char* root, const char* mount, const char* group, bool second) {
  char path[4096];
  int top = snprintf(path, sizeof path, "%s/sys/fs/cgroup%s", root, mount);
  int length = snprintf(path + top, sizeof path - (size_t)top, "%s", group) + top;
  if (top >= (int)sizeof path || length >= (int)sizeof path) return 0;
  int limit = 0;
  for (;;) {
    limit = smaller(limit_of(path, second), limit);
    char* slash = strrchr(path + top, '/');
    if (!slash) return limit;
    *slash = 0;
  }
}

/* Whether `word` is one of the comma-separated words from `list` to `end`. */
static bool holds(const char* list, const char* end, const char* word) {
  size_t length = strlen(word);
  for (const char* at = list; at <= end; ++at) {
    const char* next = memchr(at, ',', (size_t)(end - at));
    if (!next) next = end;
    if ((size_t)(next - at) == length && memcmp(at, word, length) == 0) return true;
    at = next;
  }
  return false;
}

int cpu_quota(const char* root) {
  char path[4096], text[16384];
  snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
  if (!read_text(path, text, sizeof text)) return 0;
  int limit = 0;
  char* rest = NULL;
  for (char* line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
    char* list = strchr(line, ':');
    char* group = list ? strchr(++list, ':') : NULL;
    if (!group) continue;
    if (list == group) {
      limit = smaller(limit_from(root, "", group + 1, true), limit);
      limit = smaller(limit_from(root, "/unified", group + 1, true), limit);
    } else if (holds(list, group, "cpu")) {
      limit = smaller(limit_from(root, "/cpu", group + 1, false), limit);
      limit = smaller(limit_from(root, "/cpu,cpuacct", group + 1, false), limit);
    }
  }
  return limit;
}

int default_threads(void) {
  const char* asked = getenv("NORMGRAPH_NUM_THREADS");
  if (asked && *asked) {
    long long threads = number(&asked);
    return *asked || threads < 1 || threads > MOST_THREADS ? 0 : (int)threads;
  }
  cpu_mask mask;
  int threads = smaller(cpu_quota(""), cpus_of_process(&mask));
  return threads < MOST_THREADS ? threads : MOST_THREADS;
}
