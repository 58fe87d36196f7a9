// void_mask: the LAC rule (rule.h) over every row of a norm table. Layers that did not run are inactive and leave no
// trace in the range.
// Mapping: one thread walks one row, kMaskRows rows a block; the table passes through shared memory in tiles of
// kMaskLayers columns, so that global memory is read and written along the rows.
#pragma once

#include "../args.h"
#include "../rule.h"
#include "common/reduce.cuh"

namespace void_ext::kernels {

constexpr int kMaskRows = 128;
constexpr int kMaskLayers = kWarp;

static __global__ void __launch_bounds__(kMaskRows) void_mask_kernel(const VoidMaskArgs args) {
  wait_for_stream();
  __shared__ float norms[kMaskRows][kMaskLayers + 1];  // odd row lengths in words: a column meets every bank once
  __shared__ bool flags[kMaskRows][kMaskLayers + 4];   // in: executed, out: active
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;

  const int64_t step = static_cast<int64_t>(gridDim.x) * kMaskRows;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * kMaskRows; base < args.rows; base += step) {
    const int rows = args.rows - base < kMaskRows ? static_cast<int>(args.rows - base) : kMaskRows;
    const bool mine = static_cast<int>(threadIdx.x) < rows;
    LacRule rule;
    float previous = mine ? args.norms[(base + threadIdx.x) * args.norms_stride] : 0.0f;

    for (int64_t layer = 0; layer < args.layers; layer += kMaskLayers) {
      const int layers = args.layers - layer < kMaskLayers ? static_cast<int>(args.layers - layer) : kMaskLayers;
      for (int r = warp; r < rows; r += kMaskRows / kWarp) {
        if (lane < layers) {
          norms[r][lane] = args.norms[(base + r) * args.norms_stride + layer + lane + 1];
          flags[r][lane] = args.executed == nullptr || args.executed[(base + r) * args.executed_stride + layer + lane];
        }
      }
      __syncthreads();
      if (mine) {
        for (int l = 0; l < layers; ++l) {
          const float next = norms[threadIdx.x][l];
          const float delta = next - previous;
          previous = next;
          if (flags[threadIdx.x][l]) {
            flags[threadIdx.x][l] = rule.active(delta, args.alpha);
            rule.admit(delta);
          }
        }
      }
      __syncthreads();
      // No barrier after this: a lane's next flags replace those that it stores here, and nobody reads norms any more.
      for (int r = warp; r < rows; r += kMaskRows / kWarp) {
        if (lane < layers) args.active[(base + r) * args.active_stride + layer + lane] = flags[r][lane];
      }
    }
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <typename Launch>
int launch_void_mask(const VoidMaskArgs& args, Launch&& launch) {
  if (args.rows == 0 || args.layers == 0) return cudaSuccess;
  const int64_t blocks = (args.rows + kMaskRows - 1) / kMaskRows;
  const dim3 grid(static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid));
  return launch(void_mask_kernel, grid, dim3(kMaskRows), args);
}

}  // namespace void_ext::kernels
