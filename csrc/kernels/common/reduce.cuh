// How rows are mapped to threads, and the sum over a row's threads. A row gets blockDim.x threads, a number that
// depends on its width alone; rows of up to one warp share a block (blockDim.y of them), so such a block needs no
// barrier. The number of rows chooses the grid and nothing else: a row's sum has the same bits alone or in any batch.
#pragma once

#include <cstdint>

#include "vec.cuh"

namespace void_ext::kernels {

constexpr int kWarp = 32;

// With 1024, a thread would have 64 registers: too few for add_rms_norm, which takes up to 121 (on sm_120), and for
// verdicts. The others are held to 64 (two such blocks), so that four times 128 bits a thread and operand find room in
// flight.
constexpr int kMaxThreadsPerRow = 512;
constexpr int kMaxWarps = kMaxThreadsPerRow / kWarp;
constexpr int kWarpRowsPerBlock = 4;
constexpr int64_t kMaxGrid = 2147483647;  // gridDim.x; the kernels loop over what is beyond

// A whole number of warps in which every thread holds at most kPacksPerThread packs, as far as a block's size allows.
template <typename T>
inline int threads_per_row(int64_t width) {
  const uint32_t warps = (pack_count<T>(width) + kWarp * kPacksPerThread - 1) / (kWarp * kPacksPerThread);
  return kWarp * static_cast<int>(warps < 1 ? 1 : warps < kMaxWarps ? warps : kMaxWarps);
}

// Calls `launch` with a grid of rows of `width` elements each.
template <typename T, typename Launch, typename Args>
int launch_rows(Launch&& launch, void (*kernel)(Args), int64_t rows, int64_t width, const Args& args) {
  if (width > kMaxPacks * kPackSize<T>) return cudaErrorInvalidValue;
  const int threads = threads_per_row<T>(width);
  const int rows_per_block = threads == kWarp ? kWarpRowsPerBlock : 1;
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
  const dim3 grid(static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid));
  return launch(kernel, grid, dim3(threads, rows_per_block), args);
}

__device__ __forceinline__ int64_t first_row() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }
__device__ __forceinline__ int64_t row_step() { return static_cast<int64_t>(gridDim.x) * blockDim.y; }

// Lets the next kernel of ours in the stream begin, as far as it comes without this one's results (LaunchTuning).
__device__ __forceinline__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Blocks of a grid so small that those of the kernels behind it find room beside them. Any other lets the next one
// begin once its own loads are done: blocks that only wait would take the place of blocks that work (measured: 64 rows
// of 8192 on an H100 take 0.5 us longer).
constexpr unsigned kFewBlocks = 16;

// First in every kernel, with the number of its blocks: returns once everything ahead in the stream is done and can be
// read.
__device__ __forceinline__ void wait_for_stream(unsigned blocks = gridDim.x) {
  if (blocks <= kFewBlocks) let_next_begin();
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

constexpr int kMaxSums = 2;

// Shared memory for the warps' shares of sum i. Not a template's, which the host shim could not find and poison.
static __device__ __forceinline__ float* warp_sums(int i) {
  alignas(kPackBytes) __shared__ float sums[kMaxSums][kMaxWarps];
  return sums[i];
}

// Sums over a row's threads; every thread receives the totals. The exchange is symmetric and float addition commutes,
// so all threads hold the same bits. All threads of the block must call it when blockDim.x is more than a warp, and a
// barrier must come between two calls.
template <int kSums>
__device__ __forceinline__ void row_sum(float (&sums)[kSums]) {
  static_assert(kSums <= kMaxSums);
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], distance);
  }
  if (blockDim.x == kWarp) return;

  const unsigned warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) warp_sums(i)[threadIdx.x / kWarp] = sums[i];
  }
  __syncthreads();
  if (warps <= kPackWords) {  // one read that all threads make at the same address, and no more shuffles
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const Pack shares = *reinterpret_cast<const Pack*>(warp_sums(i));
      float share[kPackWords];
#pragma unroll
      for (unsigned w = 0; w < kPackWords; ++w) share[w] = w < warps ? bits_as<float>(shares.word[w]) : 0.0f;
      sums[i] = (share[0] + share[2]) + (share[1] + share[3]);
    }
    return;
  }
  // Each group of kMaxWarps lanes holds all shares.
  static_assert(kWarp % kMaxWarps == 0 && kMaxWarps > kPackWords);
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = lane % kMaxWarps < warps ? warp_sums(i)[lane % kMaxWarps] : 0.0f;
#pragma unroll
  for (int distance = kMaxWarps / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], distance);
  }
}

// The barrier that row_sum asks for, at the end of a row's work, where another row follows.
__device__ __forceinline__ void before_next_row(int64_t row, int64_t rows) {
  if (blockDim.x > kWarp && row + row_step() < rows) __syncthreads();
}

// A thread's running sum of squares, one chain for each pack it holds at once: shorter chains, smaller rounding error.
struct Squares {
  float chain[kPacksPerThread] = {};

  // Adds the squares of x, which is the pack in `slot`, if that is one of the row's.
  template <int kSize>
  __device__ __forceinline__ void add(int slot, const float (&x)[kSize], bool in_row) {
    float sum = chain[slot];
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum = __fmaf_rn(x[i], x[i], sum);
    chain[slot] = in_row ? sum : chain[slot];
  }

  __device__ __forceinline__ float total() const {
    static_assert(kPacksPerThread == 4, "the order of this sum is part of the result");
    return (chain[0] + chain[1]) + (chain[2] + chain[3]);
  }
};

}  // namespace void_ext::kernels
