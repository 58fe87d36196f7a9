// CUDA's execution model on one CPU thread: blocks one after another, the threads of a block as fibers. A warp runs as
// far as it can before the next one starts, first to last or last to first, so that a missing barrier shows. A thread
// that others wait for in vain (divergence) ends the launch with an exception that names it.
#pragma once

#include <cstdint>
#include <functional>

namespace void_ext::hostshim {

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 gridDim, blockDim, blockIdx, threadIdx;

// Runs `body` once for every thread of the grid; throws std::runtime_error on divergence.
void run_grid(dim3 grid, dim3 block, bool last_warp_first, const std::function<void()>& body);

// For the running thread: __syncthreads, its lane, and a shuffle that returns what lane `source` offered.
void wait_for_block();
int lane();
uint32_t exchange(uint32_t mask, uint32_t value, int source);

}  // namespace void_ext::hostshim
