// keep_rows: h = residual + update, added in float32 and rounded to the rows' dtype, in the rows that are on; elsewhere
// h = residual, bit for bit, and update is not read.
// Mapping: as add_l2norm, a row to blockDim.x threads (common/reduce.cuh); the flag is one address for all of them. One
// loop serves both kinds of rows: with one for each, the addresses do not fit into 64 registers.
#pragma once

#include "../args.h"
#include "common/reduce.cuh"

namespace void_ext::kernels {

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreadsPerRow, 2) keep_rows_kernel(const KeepRowsArgs args) {
  wait_for_stream();
  using Bits = typename Element<T>::Bits;
  const uint32_t packs = pack_count<T>(args.width);
  for (int64_t row = first_row(); row < args.rows; row += row_step()) {
    const Bits* residual = static_cast<const Bits*>(args.residual) + row * args.residual_stride;
    const Bits* update = static_cast<const Bits*>(args.update) + row * args.update_stride;
    Bits* out = static_cast<Bits*>(args.out) + row * args.out_stride;
    const bool on = args.on[row * args.on_stride];
    for (uint32_t first = threadIdx.x; first < packs; first += kPacksPerThread * blockDim.x) {
      Pack h[kPacksPerThread], u[kPacksPerThread] = {};
      load_packs<T, kAligned>(residual, first, packs, args.width, h);
      if (on) load_packs<T, kAligned>(update, first, packs, args.width, u);
#pragma unroll
      for (int k = 0; k < kPacksPerThread; ++k) {
        const uint32_t index = first + k * blockDim.x;
        float x[kPackSize<T>], y[kPackSize<T>];
        widen<T>(h[k], x);
        widen<T>(u[k], y);
#pragma unroll
        for (int i = 0; i < kPackSize<T>; ++i) y[i] = __fadd_rn(x[i], y[i]);
        if (on) h[k] = narrow<T>(y);  // a sum with zero would not keep the bits: -0.0, NaN payloads
        if (index < packs) store_pack<T, kAligned>(out, index, args.width, h[k]);
      }
    }
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <typename Launch>
int launch_keep_rows(const KeepRowsArgs& args, Launch&& launch) {
  if (args.rows == 0 || args.width == 0) return cudaSuccess;
  return with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const bool aligned = args.width % kPackSize<T> == 0 && rows_aligned<T>(args.residual, args.residual_stride) &&
                         rows_aligned<T>(args.update, args.update_stride) && rows_aligned<T>(args.out, args.out_stride);
    auto kernel = aligned ? keep_rows_kernel<T, true> : keep_rows_kernel<T, false>;
    return launch_rows<T>(launch, kernel, args.rows, args.width, args);
  });
}

}  // namespace void_ext::kernels
