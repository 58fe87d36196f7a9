// scatter_rows: stream[index[i]] = source[i] for i < min(count, capacity), capacity the rows of source; gather_rows the
// other way round. Other rows of stream are neither read nor written, and an index that is no row is skipped.
// Mapping: a row of `source` to blockDim.x threads (common/reduce.cuh). No two may have the same index.
#pragma once

#include "../args.h"
#include "common/copy.cuh"
#include "common/reduce.cuh"

namespace void_ext::kernels {

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreadsPerRow, 2) scatter_rows_kernel(const ScatterRowsArgs args) {
  wait_for_stream();
  using Bits = typename Element<T>::Bits;
  const uint32_t packs = pack_count<T>(args.width);
  const int64_t count = *args.count < args.capacity ? *args.count : args.capacity;
  for (int64_t i = first_row(); i < count; i += row_step()) {
    const int64_t row = args.index[i * args.index_stride];
    if (row < 0 || row >= args.rows) continue;
    copy_row<T, kAligned>(static_cast<const Bits*>(args.source) + i * args.source_stride,
                          static_cast<Bits*>(args.stream) + row * args.stream_stride, args.width, packs);
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <typename Launch>
int launch_scatter_rows(const ScatterRowsArgs& args, Launch&& launch) {
  if (args.capacity == 0 || args.width == 0) return cudaSuccess;
  return with_size_of(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const bool aligned = args.width % kPackSize<T> == 0 && rows_aligned<T>(args.stream, args.stream_stride) &&
                         rows_aligned<T>(args.source, args.source_stride);
    auto kernel = aligned ? scatter_rows_kernel<T, true> : scatter_rows_kernel<T, false>;
    return launch_rows<T>(launch, kernel, args.capacity, args.width, args);
  });
}

}  // namespace void_ext::kernels
