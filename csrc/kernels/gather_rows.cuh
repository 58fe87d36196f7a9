// gather_rows: out[i] = stream[index[i]] for i < min(count, capacity). The count stays on the device: there is a row of
// threads for each of the capacity rows, and those beyond the count do nothing. An index that is no row is skipped.
// Mapping: a row of `out` to blockDim.x threads (common/reduce.cuh).
#pragma once

#include "../args.h"
#include "common/copy.cuh"
#include "common/reduce.cuh"

namespace void_ext::kernels {

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreadsPerRow, 2) gather_rows_kernel(const GatherRowsArgs args) {
  wait_for_stream();
  using Bits = typename Element<T>::Bits;
  const uint32_t packs = pack_count<T>(args.width);
  const int64_t count = *args.count < args.capacity ? *args.count : args.capacity;
  for (int64_t i = first_row(); i < count; i += row_step()) {
    const int64_t row = args.index[i * args.index_stride];
    if (row < 0 || row >= args.rows) continue;
    copy_row<T, kAligned>(static_cast<const Bits*>(args.stream) + row * args.stream_stride,
                          static_cast<Bits*>(args.out) + i * args.out_stride, args.width, packs);
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <typename Launch>
int launch_gather_rows(const GatherRowsArgs& args, Launch&& launch) {
  if (args.capacity == 0 || args.width == 0) return cudaSuccess;
  return with_size_of(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const bool aligned = args.width % kPackSize<T> == 0 && rows_aligned<T>(args.stream, args.stream_stride) &&
                         rows_aligned<T>(args.out, args.out_stride);
    auto kernel = aligned ? gather_rows_kernel<T, true> : gather_rows_kernel<T, false>;
    return launch_rows<T>(launch, kernel, args.capacity, args.width, args);
  });
}

}  // namespace void_ext::kernels
