// row_l2norm: norms[row] = ||stream||, for a stream whose addition cannot be reached. Same mapping and order of
// summation as add_l2norm, hence the same bits for the same row.
#pragma once

#include "../args.h"
#include "common/reduce.cuh"

namespace void_ext::kernels {

// A thread's share of a row's sum of squares.
template <typename T, bool kAligned>
__device__ __forceinline__ float squares_of(const typename Element<T>::Bits* row, int64_t width) {
  const uint32_t packs = pack_count<T>(width);
  Squares squares;
  for (uint32_t first = threadIdx.x; first < packs; first += kPacksPerThread * blockDim.x) {
    Pack h[kPacksPerThread];
    load_packs<T, kAligned>(row, first, packs, width, h);
#pragma unroll
    for (int k = 0; k < kPacksPerThread; ++k) {
      float x[kPackSize<T>];
      widen<T>(h[k], x);
      squares.add(k, x, first + k * blockDim.x < packs);
    }
  }
  return squares.total();
}

// The rows of one stream, a block's share of them.
template <typename T, bool kAligned>
__device__ __forceinline__ void norms_of(const void* stream, int64_t stream_stride, float* norms, int64_t norms_stride,
                                         int64_t rows, int64_t width) {
  for (int64_t row = first_row(); row < rows; row += row_step()) {
    const auto* elements = static_cast<const typename Element<T>::Bits*>(stream) + row * stream_stride;
    float sum[1] = {squares_of<T, kAligned>(elements, width)};
    let_next_begin();
    row_sum(sum);
    if (threadIdx.x == 0) norms[row * norms_stride] = __fsqrt_rn(sum[0]);
    before_next_row(row, rows);
  }
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreadsPerRow, 2) row_l2norm_kernel(const RowL2NormArgs args) {
  wait_for_stream();
  norms_of<T, kAligned>(args.stream, args.stream_stride, args.norms, args.norms_stride, args.rows, args.width);
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <typename Launch>
int launch_row_l2norm(const RowL2NormArgs& args, Launch&& launch) {
  if (args.rows == 0) return cudaSuccess;
  return with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const bool aligned = args.width % kPackSize<T> == 0 && rows_aligned<T>(args.stream, args.stream_stride);
    auto kernel = aligned ? row_l2norm_kernel<T, true> : row_l2norm_kernel<T, false>;
    return launch_rows<T>(launch, kernel, args.rows, args.width, args);
  });
}

}  // namespace void_ext::kernels
