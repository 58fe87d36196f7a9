// compact: index = the rows whose flag is set, ascending, then -1; inverse[row] = its place in index, or -1; count.
// Stable by construction: ranks come from ballots and sums, no atomics. Mapping: one block, which walks the flags in
// tiles and carries the count along; a warp holds kFlagsPerThread words of 32 neighbouring flags of a tile. Made for
// the rows of a forward call, up to some 10,000: there a launch costs more than the walk. Far more rows are right, but
// one multiprocessor moves their 17 bytes each.
#pragma once

#include "../args.h"
#include "common/reduce.cuh"

namespace void_ext::kernels {

constexpr int kMaxCompactThreads = 1024;
constexpr int kFlagsPerThread = 8;
constexpr int kFlagsPerWarp = kWarp * kFlagsPerThread;

static __global__ void __launch_bounds__(kMaxCompactThreads) compact_kernel(const CompactArgs args) {
  wait_for_stream();
  __shared__ uint32_t totals[kMaxCompactThreads / kWarp];  // flags set in each warp's part of the tile
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int warps = blockDim.x / kWarp;
  const uint32_t lanes_before = (1u << lane) - 1u;

  int64_t count = 0;  // set in the tiles before
  for (int64_t base = 0; base < args.rows; base += static_cast<int64_t>(warps) * kFlagsPerWarp) {
    const int64_t first = base + warp * kFlagsPerWarp + lane;
    bool on[kFlagsPerThread];
#pragma unroll
    for (int k = 0; k < kFlagsPerThread; ++k) {
      const int64_t row = first + k * kWarp;
      on[k] = row < args.rows && args.on[row * args.on_stride];
    }
    uint32_t word[kFlagsPerThread];
    uint32_t total = 0;
#pragma unroll
    for (int k = 0; k < kFlagsPerThread; ++k) {
      word[k] = __ballot_sync(0xffffffffu, on[k]);
      total += __popc(word[k]);
    }
    if (lane == 0) totals[warp] = total;
    __syncthreads();
    int64_t place = count;  // of the first flag set in this warp's part
    for (int w = 0; w < warps; ++w) {
      if (w < warp) place += totals[w];
      count += totals[w];
    }
    __syncthreads();  // the next tile's totals replace these
#pragma unroll
    for (int k = 0; k < kFlagsPerThread; ++k) {
      const int64_t row = first + k * kWarp;
      const int64_t at = place + __popc(word[k] & lanes_before);
      if (row < args.rows) args.inverse[row] = on[k] ? at : -1;
      if (on[k]) args.index[at] = row;
      place += __popc(word[k]);
    }
  }
  for (int64_t i = count + threadIdx.x; i < args.rows; i += blockDim.x) args.index[i] = -1;
  if (threadIdx.x == 0) *args.count = count;
}

// ---- launch ---------------------------------------------------------------------------------------------------------

// Launched for no rows too: the count is to be written.
template <typename Launch>
int launch_compact(const CompactArgs& args, Launch&& launch) {
  constexpr int64_t kMaxWarps = kMaxCompactThreads / kWarp;
  const int64_t warps = (args.rows + kFlagsPerWarp - 1) / kFlagsPerWarp;
  const int threads = kWarp * static_cast<int>(warps < 1 ? 1 : warps < kMaxWarps ? warps : kMaxWarps);
  return launch(compact_kernel, dim3(1), dim3(threads), args);
}

}  // namespace void_ext::kernels
