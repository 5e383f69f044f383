// A thread of a kernel is a fiber: a stack of its own, switched to and from by the scheduler.

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>

#include "engine.h"

namespace simt {

Thread* current = nullptr;

namespace {

jmp_buf scheduler;
void (*thread_body)();

// The stack outlives a block: the next one's thread runs on it.
void forever() {
  for (;;) {
    thread_body();
    suspend();
  }
}

}  // namespace

void prepare(Thread& thread, void (*body)()) {
  thread_body = body;
  if (thread.stack) return;
  void* at = mmap(nullptr, STACK, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) {
    perror("mmap");
    exit(3);
  }
  thread.stack = static_cast<char*>(at);
  thread.started = false;
}

void resume(Thread& thread) {
  current = &thread;
  if (_setjmp(scheduler) == 0) {
    if (thread.started) _longjmp(thread.context, 1);
    thread.started = true;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = thread.stack;
    start.uc_stack.ss_size = STACK;
    start.uc_link = nullptr;
    makecontext(&start, forever, 0);
    setcontext(&start);
  }
  current = nullptr;
}

// The thread is somewhere in a kernel that nobody will finish.
void reset(Thread& thread) { thread.started = false; }

void suspend() {
  store_ends();
  if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}

}  // namespace simt
