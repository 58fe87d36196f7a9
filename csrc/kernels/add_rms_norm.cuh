// add_rms_norm: add_l2norm, then normed = round(round(h * rsqrt(sum(h^2) / width + eps)) * weight): the rounding order
// of Hugging Face's LlamaRMSNorm over the stream as stored, with the mean as a product with 1 / width, as torch has it
// on CUDA. The sum of squares that the norm needs is the one that RMSNorm needs. Mapping: as add_l2norm. Rows of up to
// kMaxThreadsPerRow * kPacksPerThread packs stay in registers between the two passes; wider and unaligned ones are read
// back by the threads that wrote them.
#pragma once

#include "add_l2norm.cuh"

namespace void_ext::kernels {

template <typename T>
__device__ __forceinline__ Pack scale_pack(const Pack& h, const Pack& weight, float scale) {
  float x[kPackSize<T>], w[kPackSize<T>];
  widen<T>(h, x);
#pragma unroll
  for (int i = 0; i < kPackSize<T>; ++i) x[i] = __fmul_rn(x[i], scale);
  widen<T>(narrow<T>(x), x);
  widen<T>(weight, w);
#pragma unroll
  for (int i = 0; i < kPackSize<T>; ++i) x[i] = __fmul_rn(x[i], w[i]);
  return narrow<T>(x);
}

// Separate multiplication and addition: a fused one would round once less than torch does.
__device__ __forceinline__ float rms_scale(float sum, int64_t width, float eps) {
  const float mean = __fmul_rn(sum, __fdiv_rn(1.0f, static_cast<float>(width)));
  return rsqrtf(__fadd_rn(mean, eps));
}

template <typename T, bool kUpdates>
__global__ void __launch_bounds__(kMaxThreadsPerRow) add_rms_norm_resident_kernel(const AddRmsNormArgs args) {
  using Bits = typename Element<T>::Bits;
  const Bits* weight = static_cast<const Bits*>(args.weight);
  for (int64_t row = first_row(); row < args.add.rows; row += row_step()) {
    AddRow<T, true, kUpdates> add(args.add, row);
    Pack h[kPacksPerThread], w[kPacksPerThread];
    add.add_chunk(threadIdx.x, h);
#pragma unroll
    for (int k = 0; k < kPacksPerThread; ++k) {  // before the reduction, which hides their latency
      const uint32_t index = threadIdx.x + k * blockDim.x;
      w[k] = index < add.packs ? load_pack<T, true>(weight, index, add.width) : Pack{};
    }
    const float scale = rms_scale(add.finish(args.add, row), add.width, args.eps);
    Bits* normed = static_cast<Bits*>(args.normed) + row * args.normed_stride;
#pragma unroll
    for (int k = 0; k < kPacksPerThread; ++k) {
      const uint32_t index = threadIdx.x + k * blockDim.x;
      if (index < add.packs) store_pack<T, true>(normed, index, add.width, scale_pack<T>(h[k], w[k], scale));
    }
    before_next_row(row, args.add.rows);
  }
}

template <typename T, bool kAligned, bool kUpdates>
__global__ void __launch_bounds__(kMaxThreadsPerRow, 2) add_rms_norm_reread_kernel(const AddRmsNormArgs args) {
  using Bits = typename Element<T>::Bits;
  const Bits* weight = static_cast<const Bits*>(args.weight);
  for (int64_t row = first_row(); row < args.add.rows; row += row_step()) {
    AddRow<T, kAligned, kUpdates> add(args.add, row);
    for (uint32_t first = threadIdx.x; first < add.packs; first += kPacksPerThread * blockDim.x) {
      Pack h[kPacksPerThread];
      add.add_chunk(first, h);
    }
    const float scale = rms_scale(add.finish(args.add, row), add.width, args.eps);
    Bits* normed = static_cast<Bits*>(args.normed) + row * args.normed_stride;
    for (uint32_t index = threadIdx.x; index < add.packs; index += blockDim.x) {
      const Pack h = load_pack<T, kAligned>(add.out, index, add.width);
      const Pack w = load_pack<T, kAligned>(weight, index, add.width);
      store_pack<T, kAligned>(normed, index, add.width, scale_pack<T>(h, w, scale));
    }
    before_next_row(row, args.add.rows);
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <typename Launch>
int launch_add_rms_norm(const AddRmsNormArgs& args, Launch&& launch) {
  if (args.add.rows == 0) return cudaSuccess;
  return with_dtype(args.add.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const bool updates = args.add.updates != nullptr;
    const bool aligned =
        add_aligned<T>(args.add) && rows_aligned<T>(args.normed, args.normed_stride) && rows_aligned<T>(args.weight, 0);
    const bool resident = aligned && pack_count<T>(args.add.width) <= kMaxThreadsPerRow * kPacksPerThread;
    auto kernel =
        resident ? (updates ? add_rms_norm_resident_kernel<T, true> : add_rms_norm_resident_kernel<T, false>)
        : aligned
            ? (updates ? add_rms_norm_reread_kernel<T, true, true> : add_rms_norm_reread_kernel<T, true, false>)
            : (updates ? add_rms_norm_reread_kernel<T, false, true> : add_rms_norm_reread_kernel<T, false, false>);
    return launch_rows<T>(launch, kernel, args.add.rows, args.add.width, args);
  });
}

}  // namespace void_ext::kernels
