/* The thread pool behind parallel loops.
 *
 * A launch offers its tasks in ranges, one a thread. Each thread takes tasks from the front of its
 * own range and then from the ends of the others', by compare and exchange; the caller takes part.
 * So no task waits for a thread that sleeps, was not given a CPU, or is not there after a fork, and
 * neighbouring tasks stay with one thread. Several threads may launch at once: workers help all of
 * them. Where all places for jobs are taken, and inside a task, a loop runs on its caller. Idle
 * workers look out for work for 100 us and then sleep.
 *
 * docs/threads.md says why it is not OpenMP or TVM's pool, with measurements.
 */
#define _GNU_SOURCE
#include "backend.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

KEEP_OLD(pthread_create);
KEEP_OLD(pthread_detach);
KEEP_OLD(pthread_sigmask);

/* Tasks a thread: several, so that a thread that comes late or is held up gives some away. A short
 * loop has one: what a kernel does at the beginning and the end of a task would take 5 to 10 % of
 * it. */
enum { SPLIT = 4 };
/* A loop is short below so many nanoseconds, as one thread does it. No thread is woken for it
 * either; see wake_where_it_pays. */
enum { SHORT = 60000 };
/* One launch out of so many is timed. */
enum { TIMED = 16 };
/* Nanoseconds. Idle threads wait with pauses, then let others run as well, then sleep. */
enum { YIELD_AFTER = 5000, SLEEP_AFTER = 100000 };

enum { JOBS = 8, LINE = 64, LOOPS = 64, MOST_TASKS = 4096 };

/* Tasks that nobody has begun: the job's generation, the end and the beginning of a range, in 32,
 * 16 and 16 bits. The generation makes a claim that was overtaken by the next job fail. */
typedef struct {
  _Alignas(LINE) _Atomic uint64_t tasks;
} range;

/* One launch. Its own thread fills it in and publishes it by storing the ranges. */
typedef struct {
  _Alignas(LINE) atomic_bool taken;
  uint32_t generation;
  _Atomic(parallel_body) body;
  _Atomic(void*) data;
  _Atomic int32_t num_task;
  _Atomic int threads;
  _Alignas(LINE) _Atomic uint32_t unfinished;
  _Atomic bool awaited;
  _Atomic int status;
  _Atomic(void*) error;
  range ranges[MOST_THREADS];
} job;

/* One task of a job, claimed. */
typedef struct {
  parallel_body body;
  void* data;
  int32_t num_task;
  int number;
} task;

static job jobs[JOBS];
static struct {
  _Alignas(LINE) _Atomic uint32_t epoch; /* counts launches; idle workers wait for it to change */
  _Atomic uint32_t open;                 /* a bit a job that may have tasks to claim */
  _Alignas(LINE) _Atomic uint32_t sleepers;
  _Atomic uint64_t alone; /* when a launch last found threads asleep, in nanoseconds */
  _Alignas(LINE) _Atomic int limit; /* threads of a launch; 0 before it is known */
  _Atomic int provided;             /* as many threads as have been asked for, with the caller */
  _Atomic int caller;               /* the CPU of the last launch */
} pool;

/* Of loops: half of the body's address, and the nanoseconds that one thread would take for all
 * tasks, as last timed. */
static _Atomic uint64_t costs[LOOPS];

/* Guards what follows, and changes of `limit` and `provided`. */
static pthread_mutex_t manage = PTHREAD_MUTEX_INITIALIZER;
static bool alive[MOST_THREADS];

static _Thread_local bool in_task;

static void sleep_while(_Atomic uint32_t* word, uint32_t value) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void wake(_Atomic uint32_t* word, int threads) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, threads, NULL, NULL, 0);
}

typedef struct {
  uint64_t since;
  uint32_t turns;
} patience;

/* One turn of waiting for another thread: pauses at first, then lets other threads run as well.
 * False when it is time to sleep. */
static bool wait_a_turn(patience* p) {
  if (++p->turns % 32 != 0) {
    relax();
    return true;
  }
  uint64_t now = nanoseconds();
  if (!p->since) p->since = now;
  if (now - p->since > YIELD_AFTER) sched_yield();
  return now - p->since < SLEEP_AFTER;
}

/* Takes a task: of the own range the first, of another's the last. What is read before the exchange
 * belongs to the job whose range is exchanged: a job changes only after its last task. */
static bool claim(job* from, int place, bool own, task* claimed) {
  _Atomic uint64_t* word = &from->ranges[place].tasks;
  uint64_t seen = atomic_load_explicit(word, memory_order_acquire);
  for (;;) {
    int begin = (int)(seen & 0xffff), end = (int)(seen >> 16 & 0xffff);
    if (begin >= end) return false;
    claimed->body = atomic_load_explicit(&from->body, memory_order_relaxed);
    claimed->data = atomic_load_explicit(&from->data, memory_order_relaxed);
    claimed->num_task = atomic_load_explicit(&from->num_task, memory_order_relaxed);
    claimed->number = own ? begin : end - 1;
    uint64_t left = own ? seen + 1 : seen - (UINT64_C(1) << 16);
    if (atomic_compare_exchange_weak_explicit(word, &seen, left, memory_order_acq_rel,
                                              memory_order_acquire)) {
      return true;
    }
  }
}

/* Keeps the first error for the thread that launched the job. */
static void fail(job* of, int status) {
  void* error = take_error();
  int none = 0;
  if (atomic_compare_exchange_strong(&of->status, &none, status)) {
    atomic_store(&of->error, error);
  } else {
    drop_error(error);
  }
}

/* Runs tasks of a job until none is left to claim, or `most` of them. Returns how many. */
static uint32_t work_on(job* on, int home, uint32_t most) {
  int threads = atomic_load_explicit(&on->threads, memory_order_relaxed);
  uint32_t done = 0;
  for (int turn = 0; turn < threads; ++turn) {
    task next;
    while (done < most && claim(on, (home + turn) % threads, turn == 0, &next)) {
      task_env env = {NULL, next.num_task};
      int status = next.body(next.number, &env, next.data);
      if (status != 0) fail(on, status);
      ++done;
    }
  }
  if (done) order_stores();
  if (done && atomic_fetch_sub(&on->unfinished, done) == done && atomic_load(&on->awaited)) {
    wake(&on->unfinished, 1);
  }
  return done;
}

static bool retire(int index) {
  pthread_mutex_lock(&manage);
  bool leaves = index >= atomic_load(&pool.limit);
  if (leaves) alive[index] = false;
  pthread_mutex_unlock(&manage);
  return leaves;
}

static void* worker(void* argument) {
  int index = (int)(intptr_t)argument;
  char name[16];
  snprintf(name, sizeof name, "normgraph-%d", index);
  prctl(PR_SET_NAME, name);
  placement here;
  place_worker(&here);
  in_task = true;
  bool slept = false;
  for (;;) {
    uint32_t epoch = atomic_load(&pool.epoch);
    if (index >= atomic_load(&pool.limit) && retire(index)) return NULL;
    leave_cpu(&here, atomic_load_explicit(&pool.caller, memory_order_relaxed));
    uint32_t open = atomic_load(&pool.open);
    /* Waking spreads from thread to thread while there is work for more of them. */
    if (slept && open && atomic_load(&pool.sleepers)) wake(&pool.epoch, 2);
    slept = false;
    for (; open; open &= open - 1) work_on(&jobs[__builtin_ctz(open)], index, UINT32_MAX);
    patience p = {0, 0};
    while (atomic_load_explicit(&pool.epoch, memory_order_acquire) == epoch) {
      if (wait_a_turn(&p)) continue;
      atomic_fetch_add(&pool.sleepers, 1);
      sleep_while(&pool.epoch, epoch);
      atomic_fetch_sub(&pool.sleepers, 1);
      slept = true;
    }
  }
}

static void before_fork(void) { pthread_mutex_lock(&manage); }
static void in_parent(void) { pthread_mutex_unlock(&manage); }

/* A child has none of the workers, nor the threads whose launches were under way. */
static void in_child(void) {
  for (int i = 0; i < JOBS; ++i) {
    if (!atomic_load(&jobs[i].taken)) continue;
    for (int place = 0; place < atomic_load(&jobs[i].threads); ++place) {
      atomic_store(&jobs[i].ranges[place].tasks, 0);
    }
    atomic_store(&jobs[i].taken, false);
  }
  for (int i = 0; i < MOST_THREADS; ++i) alive[i] = false;
  atomic_store(&pool.open, 0);
  atomic_store(&pool.sleepers, 0);
  atomic_store(&pool.provided, 0);
  pthread_mutex_init(&manage, NULL);
}

bool handle_forks(void) { return pthread_atfork(before_fork, in_parent, in_child) == 0; }

/* Starts the workers that a launch of so many threads lacks. Where the system refuses one, those
 * that run do its share. */
static void provide(int threads) {
  pthread_mutex_lock(&manage);
  int limit = atomic_load(&pool.limit); /* it may have been lowered meanwhile */
  if (threads > limit) threads = limit;
  sigset_t blocked, before;
  sigfillset(&blocked);
  sigdelset(&blocked, SIGBUS);
  sigdelset(&blocked, SIGFPE);
  sigdelset(&blocked, SIGILL);
  sigdelset(&blocked, SIGSEGV);
  pthread_sigmask(SIG_SETMASK, &blocked, &before);
  for (int index = 1; index < threads; ++index) {
    pthread_t thread;
    if (alive[index]) continue;
    if (pthread_create(&thread, NULL, worker, (void*)(intptr_t)index) != 0) break;
    pthread_detach(thread);
    alive[index] = true;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  atomic_store(&pool.provided, threads);
  pthread_mutex_unlock(&manage);
}

int pool_threads(void) {
  int threads = atomic_load_explicit(&pool.limit, memory_order_relaxed);
  if (threads) return threads;
  threads = default_threads();
  if (!threads) {
    set_error("ValueError", "NORMGRAPH_NUM_THREADS: expected a whole number from 1 to 256");
    return 0;
  }
  int unknown = 0;
  return atomic_compare_exchange_strong(&pool.limit, &unknown, threads) ? threads : unknown;
}

void set_pool_threads(int threads) {
  pthread_mutex_lock(&manage);
  atomic_store(&pool.limit, threads);
  if (atomic_load(&pool.provided) > threads) atomic_store(&pool.provided, threads);
  pthread_mutex_unlock(&manage);
  /* Workers above the limit leave. */
  atomic_fetch_add(&pool.epoch, 1);
  wake(&pool.epoch, MOST_THREADS);
}

/* TVM's rule for num_task: 0 stands for as many tasks as there are threads. */
int launch_serially(parallel_body body, void* data, int num_task) {
  task_env env = {NULL, num_task > 0 ? num_task : 1};
  for (int number = 0; number < env.num_task; ++number) {
    int status = body(number, &env, data);
    if (status != 0) return status;
  }
  return 0;
}

static job* free_job(void) {
  for (job* each = jobs; each < jobs + JOBS; ++each) {
    if (!atomic_load_explicit(&each->taken, memory_order_relaxed) &&
        !atomic_exchange_explicit(&each->taken, true, memory_order_acquire)) {
      return each;
    }
  }
  return NULL;
}

static void publish(job* made, parallel_body body, void* data, int num_task, int threads) {
  made->generation++;
  atomic_store_explicit(&made->body, body, memory_order_relaxed);
  atomic_store_explicit(&made->data, data, memory_order_relaxed);
  atomic_store_explicit(&made->num_task, num_task, memory_order_relaxed);
  atomic_store_explicit(&made->threads, threads, memory_order_relaxed);
  atomic_store_explicit(&made->unfinished, (uint32_t)num_task, memory_order_relaxed);
  atomic_store_explicit(&made->awaited, false, memory_order_relaxed);
  atomic_store_explicit(&made->status, 0, memory_order_relaxed);
  atomic_store_explicit(&made->error, NULL, memory_order_relaxed);
  for (int place = 0; place < threads; ++place) {
    uint64_t begin = (uint64_t)(num_task * place / threads);
    uint64_t end = (uint64_t)(num_task * (place + 1) / threads);
    uint64_t word = (uint64_t)made->generation << 32 | end << 16 | begin;
    atomic_store_explicit(&made->ranges[place].tasks, word, memory_order_release);
  }
  atomic_fetch_or(&pool.open, 1u << (made - jobs));
  atomic_fetch_add(&pool.epoch, 1);
}

typedef struct {
  _Atomic uint64_t* entry;
  uint32_t name;
  bool known, is_short;
} loop;

static loop look_up(parallel_body body) {
  uint32_t name = (uint32_t)((uintptr_t)body >> 4);
  loop found = {&costs[(name ^ name >> 6) % LOOPS], name, false, false};
  uint64_t cost = atomic_load_explicit(found.entry, memory_order_relaxed);
  found.known = cost >> 32 == name;
  found.is_short = found.known && (uint32_t)cost < SHORT;
  return found;
}

/* Does the job's first task, and notes what all of them cost. */
static void time_a_task(job* made, loop* of, int num_task) {
  uint64_t start = nanoseconds();
  if (!work_on(made, 0, 1)) return;
  uint64_t cost = (nanoseconds() - start) * (uint64_t)num_task;
  if (cost > UINT32_MAX) cost = UINT32_MAX;
  atomic_store_explicit(of->entry, (uint64_t)of->name << 32 | cost, memory_order_relaxed);
  of->is_short = cost < SHORT;
}

/* Waking a thread costs the waker some microseconds, and the thread comes later still. A launch
 * that finds threads asleep wakes them at once where it follows closely upon another such launch,
 * or where the loop was not known to be short; else it does its first task and then decides. */
static void wake_where_it_pays(job* made, loop* of, int num_task) {
  uint64_t now = nanoseconds();
  uint64_t before = atomic_exchange_explicit(&pool.alone, now, memory_order_relaxed);
  bool hesitates = now - before > SLEEP_AFTER && of->is_short;
  if (!hesitates) wake(&pool.epoch, 1);
  time_a_task(made, of, num_task);
  if (hesitates && !of->is_short) wake(&pool.epoch, 1);
}

int launch_in_pool(parallel_body body, void* data, int num_task) {
  int threads = pool_threads();
  if (!threads) return -1;
  if (in_task || threads == 1 || num_task > MOST_TASKS) {
    return launch_serially(body, data, num_task);
  }
  job* made = free_job();
  if (!made) return launch_serially(body, data, num_task);
  loop of = look_up(body);
  if (num_task <= 0) num_task = of.is_short ? threads : threads * SPLIT;
  if (atomic_load_explicit(&pool.provided, memory_order_relaxed) < threads) provide(threads);

  int cpu = sched_getcpu();
  if (cpu != atomic_load_explicit(&pool.caller, memory_order_relaxed)) {
    atomic_store_explicit(&pool.caller, cpu, memory_order_relaxed);
  }
  publish(made, body, data, num_task, threads);
  in_task = true;
  if (atomic_load(&pool.sleepers)) {
    wake_where_it_pays(made, &of, num_task);
  } else if (!of.known || made->generation % TIMED == 0) {
    time_a_task(made, &of, num_task);
  }
  work_on(made, 0, UINT32_MAX);
  in_task = false;
  atomic_fetch_and(&pool.open, ~(1u << (made - jobs)));

  patience p = {0, 0};
  for (uint32_t left; (left = atomic_load(&made->unfinished)) != 0;) {
    if (wait_a_turn(&p)) continue;
    atomic_store(&made->awaited, true);
    sleep_while(&made->unfinished, left);
  }
  int status = atomic_load_explicit(&made->status, memory_order_relaxed);
  give_error(atomic_load_explicit(&made->error, memory_order_relaxed));
  atomic_store_explicit(&made->taken, false, memory_order_release);
  return status;
}
