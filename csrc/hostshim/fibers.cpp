// How fibers.h does it: one ucontext and one stack a thread. The scheduler switches to a fiber and back, answers a
// shuffle or barrier once all who must have arrived, and tells AddressSanitizer of every switch.
#include "fibers.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// Bounds of the section that __shared__ variables live in, provided by the linker; absent when there are none.
extern "C" __attribute__((weak)) char __start_void_ext_shared[], __stop_void_ext_shared[];

namespace void_ext::hostshim {

dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kPage = 4096;
constexpr size_t kStack = 32 * kPage;

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
  ucontext_t context;
  dim3 thread;
  State state;
  uint32_t mask, value;  // of the shuffle it waits at
  int source;
  void* fake_stack;  // AddressSanitizer's, while the fiber does not run
};

std::vector<Fiber> fibers;
Fiber* running = nullptr;
ucontext_t scheduler;
const std::function<void()>* kernel_body = nullptr;

// One mapping for all stacks, a page without access below each.
char* stack_of(size_t index) {
  static char* const stacks = [] {
    const size_t size = kMaxThreads * (kStack + kPage);
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the fibers' stacks");
    char* base = static_cast<char*>(memory);
    for (int i = 0; i < kMaxThreads; ++i) mprotect(base + i * (kStack + kPage), kPage, PROT_NONE);
    return base;
  }();
  return stacks + index * (kStack + kPage) + kPage;
}

// AddressSanitizer must be told before and after every change of stack.
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
void* scheduler_fake_stack = nullptr;
void leave(void** save, const void* stack, size_t size) { __sanitizer_start_switch_fiber(save, stack, size); }
void arrive_in_fiber(void* saved) { __sanitizer_finish_switch_fiber(saved, &scheduler_stack, &scheduler_stack_size); }
void arrive_in_scheduler() { __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr); }
#else
constexpr const void* scheduler_stack = nullptr;
constexpr size_t scheduler_stack_size = 0;
void* scheduler_fake_stack = nullptr;
void leave(void**, const void*, size_t) {}
void arrive_in_fiber(void*) {}
void arrive_in_scheduler() {}
#endif

void fiber_main() {
  arrive_in_fiber(nullptr);
  (*kernel_body)();
  running->state = State::kDone;
  leave(nullptr, scheduler_stack, scheduler_stack_size);
  setcontext(&scheduler);
}

void suspend(State state) {
  Fiber* self = running;
  self->state = state;
  leave(&self->fake_stack, scheduler_stack, scheduler_stack_size);
  swapcontext(&self->context, &scheduler);
  arrive_in_fiber(self->fake_stack);
}

void resume(size_t index) {
  running = &fibers[index];
  threadIdx = running->thread;
  leave(&scheduler_fake_stack, stack_of(index), kStack);
  swapcontext(&scheduler, &running->context);
  arrive_in_scheduler();
}

std::string where(const Fiber& fiber) {
  static const char* const kDoing[] = {"is ready", "waits at __syncthreads", "waits at a shuffle", "has returned"};
  return "thread (" + std::to_string(fiber.thread.x) + ", " + std::to_string(fiber.thread.y) + ") of block " +
         std::to_string(blockIdx.x) + " " + kDoing[static_cast<int>(fiber.state)];
}

// Answers the shuffle that a warp's threads wait at, if every lane their masks name has arrived.
bool answer_shuffle(Fiber* warp, int lanes) {
  for (int i = 0; i < lanes; ++i) {
    if (warp[i].state != State::kAtShuffle) continue;
    for (int j = 0; j < kWarp; ++j) {
      if (!(warp[i].mask >> j & 1u)) continue;
      if (j >= lanes || warp[j].state != State::kAtShuffle || warp[j].mask != warp[i].mask) return false;
    }
    if (warp[i].source < 0 || warp[i].source >= kWarp || !(warp[i].mask >> warp[i].source & 1u)) {
      throw std::runtime_error(where(warp[i]) + " for lane " + std::to_string(warp[i].source) + ", outside its mask");
    }
  }
  uint32_t answers[kWarp];
  for (int i = 0; i < lanes; ++i) answers[i] = warp[warp[i].source].value;
  bool answered = false;
  for (int i = 0; i < lanes; ++i) {
    if (warp[i].state != State::kAtShuffle) continue;
    warp[i].value = answers[i];
    warp[i].state = State::kReady;
    answered = true;
  }
  return answered;
}

void run_warp(size_t first, bool last_lane_first) {
  const size_t lanes = std::min<size_t>(kWarp, fibers.size() - first);
  do {
    for (size_t i = 0; i < lanes; ++i) {
      const size_t index = first + (last_lane_first ? lanes - 1 - i : i);
      if (fibers[index].state == State::kReady) resume(index);
    }
  } while (answer_shuffle(&fibers[first], static_cast<int>(lanes)));
}

void prepare(Fiber* fiber, unsigned linear, char* stack) {
  fiber->thread = dim3(linear % blockDim.x, linear / blockDim.x % blockDim.y, linear / (blockDim.x * blockDim.y));
  fiber->state = State::kReady;
  fiber->source = 0;
  fiber->fake_stack = nullptr;
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = stack;
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, fiber_main, 0);
}

void run_block(bool last_warp_first) {
  if (__start_void_ext_shared) {
    std::memset(__start_void_ext_shared, 0xff, static_cast<size_t>(__stop_void_ext_shared - __start_void_ext_shared));
  }
  for (size_t i = 0; i < fibers.size(); ++i) prepare(&fibers[i], static_cast<unsigned>(i), stack_of(i));
  const size_t warps = (fibers.size() + kWarp - 1) / kWarp;
  while (true) {
    for (size_t w = 0; w < warps; ++w) run_warp(kWarp * (last_warp_first ? warps - 1 - w : w), last_warp_first);
    const Fiber* done = nullptr;
    const Fiber* at_barrier = nullptr;
    for (const Fiber& fiber : fibers) {
      if (fiber.state == State::kAtShuffle) throw std::runtime_error("divergence: " + where(fiber) + " in vain");
      (fiber.state == State::kDone ? done : at_barrier) = &fiber;
    }
    if (!at_barrier) return;
    if (done) throw std::runtime_error("divergence: " + where(*at_barrier) + ", but " + where(*done));
    for (Fiber& fiber : fibers) fiber.state = State::kReady;
  }
}

}  // namespace

void run_grid(dim3 grid, dim3 block, bool last_warp_first, const std::function<void()>& body) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads) {
    throw std::runtime_error("a block has 1 to 1024 threads, got " + std::to_string(threads));
  }
  fibers.resize(threads);
  kernel_body = &body;
  gridDim = grid;
  blockDim = block;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block(last_warp_first);
      }
    }
  }
}

void wait_for_block() { suspend(State::kAtBarrier); }

int lane() { return static_cast<int>((running - fibers.data()) % kWarp); }

uint32_t exchange(uint32_t mask, uint32_t value, int source) {
  running->mask = mask;
  running->value = value;
  running->source = source;
  suspend(State::kAtShuffle);
  return running->value;
}

}  // namespace void_ext::hostshim
