// Warp-wide calls: lanes wait until all that a mask names have come, then all get their answers.

#include <cstring>

#include "engine.h"

namespace simt {

namespace {

const char* name_of(WarpOp op) {
  switch (op) {
    case WarpOp::sync: return "__syncwarp";
    case WarpOp::shuffle: return "__shfl_sync";
    case WarpOp::up: return "__shfl_up_sync";
    case WarpOp::down: return "__shfl_down_sync";
    case WarpOp::exclusive_or: return "__shfl_xor_sync";
    default: return "a vote";
  }
}

// The lane a shuffle reads; its own where that lies outside its segment.
unsigned source_lane(unsigned lane, const WarpCall& call) {
  int width = call.width, first = static_cast<int>(lane) / width * width;
  int own = static_cast<int>(lane), argument = call.lane_argument, from = own;
  if (call.op == WarpOp::shuffle) from = first + (argument & (width - 1));
  if (call.op == WarpOp::up) from = own - argument < first ? own : own - argument;
  if (call.op == WarpOp::down) from = own + argument >= first + width ? own : own + argument;
  if (call.op == WarpOp::exclusive_or)
    from = (own ^ argument) >= first + width ? own : own ^ argument;
  return static_cast<unsigned>(from) % WARP;
}

void shuffle(Warp& warp, Thread& thread, unsigned present) {
  WarpCall& call = thread.call;
  unsigned from = source_lane(thread.lane, call);
  if (present >> from & 1) {
    memcpy(call.result, warp.lanes[from]->call.value, sizeof call.result);
    return;
  }
  report("inactive-lane", name_of(call.op),
         format("%s: lane %u reads lane %u, which takes no part", name_of(call.op), thread.lane,
                from),
         thread.line);
  memset(call.result, 0xff, sizeof call.result);
}

void finish(Warp& warp, unsigned present) {
  uint32_t known[WARP] = {};
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < WARP; ++lane) {
    if (!(present >> lane & 1)) continue;
    const Thread& thread = *warp.lanes[lane];
    ballot |= thread.call.value[0] ? 1u << lane : 0;
    for (unsigned i = 0; i < WARP; ++i)
      if (thread.known[i] > known[i]) known[i] = thread.known[i];
  }
  for (unsigned lane = 0; lane < WARP; ++lane) {
    if (!(present >> lane & 1)) continue;
    Thread& thread = *warp.lanes[lane];
    if (thread.call.op == WarpOp::sync) {
      memcpy(thread.known, known, sizeof known);
      ++thread.known[lane];
    } else if (thread.call.op == WarpOp::ballot) {
      thread.call.result[0] = ballot;
    } else {
      shuffle(warp, thread, present);
    }
    make_ready(thread);
  }
}

// Answers the lanes that wait for those in the mask of `thread`, if all of these have come.
bool complete(Warp& warp, Thread& thread) {
  unsigned present = 0;
  bool alike = true;
  for (unsigned lane = 0; lane < WARP; ++lane) {
    Thread* other = warp.lanes[lane];
    if (!(thread.call.mask >> lane & 1) || !other || other->wait == Wait::exited) continue;
    if (other->wait != Wait::warp) return false;
    alike &= other->call.mask == thread.call.mask && other->call.op == thread.call.op &&
             other->line == thread.line;
    present |= 1u << lane;
  }
  if (!alike) {
    report("lane-mask", name_of(thread.call.op),
           format("%s: the lanes of mask 0x%08x make different calls or name different masks",
                  name_of(thread.call.op), thread.call.mask),
           thread.line);
    abandon();
    return false;
  }
  finish(warp, present);
  return true;
}

// Those that ask for the active lanes at one line, once no lane of the warp can go on.
void answer_active_masks(Warp& warp) {
  for (Thread* first : warp.lanes) {
    if (!first || first->wait != Wait::active_mask) continue;
    unsigned mask = 0;
    int line = first->line;
    for (unsigned lane = 0; lane < WARP; ++lane)
      if (warp.lanes[lane] && warp.lanes[lane]->wait == Wait::active_mask &&
          warp.lanes[lane]->line == line)
        mask |= 1u << lane;
    for (unsigned lane = 0; lane < WARP; ++lane)
      if (mask >> lane & 1) {
        warp.lanes[lane]->call.result[0] = mask;
        make_ready(*warp.lanes[lane]);
      }
  }
}

}  // namespace

// After a lane has come to a wait or left the kernel.
void warp_settle(Warp& warp, Thread& thread) {
  if (thread.wait == Wait::warp) complete(warp, thread);
  if (thread.wait == Wait::exited)
    for (Thread* other : warp.lanes)
      if (other && other->wait == Wait::warp) complete(warp, *other);
  if (!warp.running) answer_active_masks(warp);
}

void warp_call(WarpCall& call, int line) {
  if (!(call.mask >> current->lane & 1)) {
    report("lane-mask", name_of(call.op),
           format("%s: lane %u is not in its own mask 0x%08x", name_of(call.op), current->lane,
                  call.mask),
           line);
    abandon();
  }
  current->call = call;
  block_on(Wait::warp, line);
  suspend();
  call = current->call;
}

unsigned active_mask(int line) {
  block_on(Wait::active_mask, line);
  suspend();
  return static_cast<unsigned>(current->call.result[0]);
}

}  // namespace simt
