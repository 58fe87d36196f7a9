// streams_l2norm: norms[row, i] = ||row of stream i||, for streams that were kept until the last of them was there.
// Mapping: a stream to blockIdx.y, its rows as in row_l2norm, hence the same bits for the same row.
#pragma once

#include "row_l2norm.cuh"

namespace void_ext::kernels {

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreadsPerRow, 2) streams_l2norm_kernel(const StreamsL2NormArgs args) {
  const unsigned i = blockIdx.y;
  wait_for_stream(gridDim.x * gridDim.y);
  norms_of<T, kAligned>(args.stream[i], args.stream_stride[i], args.norms + i * args.column_stride, args.norms_stride,
                        args.rows, args.width);
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
