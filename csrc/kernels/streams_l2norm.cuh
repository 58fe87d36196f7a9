// streams_l2norm: norms[row, i] = ||row of stream i||, for streams that were kept until the last of them was there.
// Mapping: a stream to blockIdx.y, its rows as in row_l2norm, hence the same bits for the same row.
#pragma once

#include "row_l2norm.cuh"

namespace void_ext::kernels {

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreadsPerRow, 2) streams_l2norm_kernel(const StreamsL2NormArgs args) {
  using Bits = typename Element<T>::Bits;
  const Bits* stream = static_cast<const Bits*>(args.stream[blockIdx.y]);
  const int64_t stride = args.stream_stride[blockIdx.y];
  float* norms = args.norms + blockIdx.y * args.column_stride;
  wait_for_stream(gridDim.x * gridDim.y);
  for (int64_t row = first_row(); row < args.rows; row += row_step()) {
    float sum[1] = {squares_of<T, kAligned>(stream + row * stride, args.width)};
    let_next_begin();
    row_sum(sum);
    if (threadIdx.x == 0) norms[row * args.norms_stride] = __fsqrt_rn(sum[0]);
    before_next_row(row, args.rows);
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <typename Launch>
int launch_streams_l2norm(const StreamsL2NormArgs& args, Launch&& launch) {
  if (args.rows == 0 || args.count == 0) return cudaSuccess;
  if (args.count > kMostStreams) return cudaErrorInvalidValue;
  return with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    bool aligned = args.width % kPackSize<T> == 0;
    for (int64_t i = 0; i < args.count; ++i) {
      aligned = aligned && rows_aligned<T>(args.stream[i], args.stream_stride[i]);
    }
    auto kernel = aligned ? streams_l2norm_kernel<T, true> : streams_l2norm_kernel<T, false>;
    const auto beside = [&](auto chosen, dim3 grid, dim3 block, const StreamsL2NormArgs& all) {
      grid.y = static_cast<unsigned>(all.count);
      return launch(chosen, grid, block, all);
    };
    return launch_rows<T>(beside, kernel, args.rows, args.width, args);
  });
}

}  // namespace void_ext::kernels
