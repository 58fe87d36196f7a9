// exit_select: kept[row] = stream[row] where layer `layer` was active for the row by the LAC rule (rule.h). The verdict
// comes from the row's own history norms[row, 0 … layer + 1]; rows that are not active are neither read nor written.
// Mapping: a row to blockDim.x threads (common/reduce.cuh), each of which walks the history (its loads are the same
// address for all, hence broadcasts) and then copies its packs.
#pragma once

#include "../args.h"
#include "../rule.h"
#include "common/copy.cuh"
#include "common/reduce.cuh"

namespace void_ext::kernels {

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreadsPerRow, 2) exit_select_kernel(const ExitSelectArgs args) {
  wait_for_stream();
  using Bits = typename Element<T>::Bits;
  const uint32_t packs = pack_count<T>(args.width);
  for (int64_t row = first_row(); row < args.rows; row += row_step()) {
    if (!layer_active(args.norms + row * args.norms_stride, nullptr, args.layer, args.alpha)) continue;
    copy_row<T, kAligned>(static_cast<const Bits*>(args.stream) + row * args.stream_stride,
                          static_cast<Bits*>(args.kept) + row * args.kept_stride, args.width, packs);
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <typename Launch>
int launch_exit_select(const ExitSelectArgs& args, Launch&& launch) {
  if (args.rows == 0 || args.width == 0) return cudaSuccess;
  return with_size_of(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const bool aligned = args.width % kPackSize<T> == 0 && rows_aligned<T>(args.kept, args.kept_stride) &&
                         rows_aligned<T>(args.stream, args.stream_stride);
    auto kernel = aligned ? exit_select_kernel<T, true> : exit_select_kernel<T, false>;
    return launch_rows<T>(launch, kernel, args.rows, args.width, args);
  });
}

}  // namespace void_ext::kernels
