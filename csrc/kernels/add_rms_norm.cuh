// add_rms_norm: add_l2norm, then the RMSNorm of h, whose sum of squares is the norm's: normed = round(round(h * s) *
// weight), the rounding order of Hugging Face's LlamaRMSNorm, or round(h * s * (1 + weight)), GemmaRMSNorm's; s =
// rsqrt( sum(h^2) / width + eps) over the stream as stored, with the mean as a product with 1 / width, as torch has it
// on CUDA. Mapping: as add_l2norm. Rows of up to kMaxThreadsPerRow * kPacksPerThread packs stay in registers between
// the two passes; wider and unaligned ones are read back by the threads that wrote them.
#pragma once

#include "add_l2norm.cuh"

namespace void_ext::kernels {

// The weights of the elements of one pack of T. W: T, or float.
template <typename T, typename W>
struct WeightPack {
  static constexpr int kParts = kPackSize<T> / kPackSize<W>;
  Pack part[kParts];

  template <bool kAligned>
  __device__ __forceinline__ void load(const void* weight, uint32_t index, int64_t width) {
    const auto* row = static_cast<const typename Element<W>::Bits*>(weight);
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const uint32_t place = index * kParts + p;  // a pack of T may end the row within its first part
      part[p] = kAligned || place < pack_count<W>(width) ? load_pack<W, kAligned>(row, place, width) : Pack{};
    }
  }

  __device__ __forceinline__ void widened(float (&w)[kPackSize<T>]) const {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      float x[kPackSize<W>];
      widen<W>(part[p], x);
#pragma unroll
      for (int i = 0; i < kPackSize<W>; ++i) w[p * kPackSize<W> + i] = x[i];
    }
  }
};

template <typename T, typename W>
__device__ __forceinline__ Pack scale_pack(const Pack& h, const WeightPack<T, W>& weight, float scale,
                                           bool zero_centered) {
  float x[kPackSize<T>], w[kPackSize<T>];
  widen<T>(h, x);
#pragma unroll
  for (int i = 0; i < kPackSize<T>; ++i) x[i] = __fmul_rn(x[i], scale);
  weight.widened(w);
  if (zero_centered) {
#pragma unroll
    for (int i = 0; i < kPackSize<T>; ++i) w[i] = __fadd_rn(1.0f, w[i]);
  } else {
    widen<T>(narrow<T>(x), x);
  }
#pragma unroll
  for (int i = 0; i < kPackSize<T>; ++i) x[i] = __fmul_rn(x[i], w[i]);
  return narrow<T>(x);
}

// Separate multiplication and addition: a fused one would round once less than torch does.
__device__ __forceinline__ float rms_scale(float sum, int64_t width, float eps) {
  const float mean = __fmul_rn(sum, __fdiv_rn(1.0f, static_cast<float>(width)));
  return rsqrtf(__fadd_rn(mean, eps));
}

template <typename T, typename W, bool kZeroCentered, bool kUpdates>
__global__ void __launch_bounds__(kMaxThreadsPerRow) add_rms_norm_resident_kernel(const AddRmsNormArgs args) {
  using Bits = typename Element<T>::Bits;
  wait_for_stream();
  for (int64_t row = first_row(); row < args.add.rows; row += row_step()) {
    AddRow<T, true, kUpdates, false> add(args.add, row);
    Pack h[kPacksPerThread];
    WeightPack<T, W> w[kPacksPerThread];
#pragma unroll
    for (int k = 0; k < kPacksPerThread; ++k) {  // before the row, whose loads then hide their latency
      const uint32_t index = threadIdx.x + k * blockDim.x;
      w[k].template load<true>(args.weight, index < add.packs ? index : add.packs - 1, add.width);
    }
    add.add_chunk(threadIdx.x, h);
    let_next_begin();
    const float scale = rms_scale(add.finish(args.add, row), add.width, args.eps);
    Bits* normed = static_cast<Bits*>(args.normed) + row * args.normed_stride;
#pragma unroll
    for (int k = 0; k < kPacksPerThread; ++k) {
      const uint32_t index = threadIdx.x + k * blockDim.x;
      if (index < add.packs) {
        store_pack<T, true>(normed, index, add.width, scale_pack<T, W>(h[k], w[k], scale, kZeroCentered));
      }
    }
    before_next_row(row, args.add.rows);
  }
}

// Every other call: wide rows, any alignment, modes. Which formula is asked at run time, the same for all threads.
template <typename T, typename W, bool kAligned, bool kModes>
__global__ void __launch_bounds__(kMaxThreadsPerRow, 1) add_rms_norm_reread_kernel(const AddRmsNormArgs args) {
  using Bits = typename Element<T>::Bits;
  wait_for_stream();
  for (int64_t row = first_row(); row < args.add.rows; row += row_step()) {
    AddRow<T, kAligned, true, kModes> add(args.add, row);
    for (uint32_t first = threadIdx.x; first < add.packs; first += kPacksPerThread * blockDim.x) {
      Pack h[kPacksPerThread];
      add.add_chunk(first, h);
    }
    let_next_begin();
    float sum;
    if constexpr (kModes) {
      const LacHistory history = history_of(args.add, row);
      sum = add.finish(args.add, row);
      add.judge(args.add, row, history, sum);
    } else {
      sum = add.finish(args.add, row);
    }
    const float scale = rms_scale(sum, add.width, args.eps);
    Bits* normed = static_cast<Bits*>(args.normed) + row * args.normed_stride;
    for (uint32_t index = threadIdx.x; index < add.packs; index += blockDim.x) {
      const Pack h = load_pack<T, kAligned>(add.out, index, add.width);
      WeightPack<T, W> w;
      w.template load<kAligned>(args.weight, index, add.width);
      store_pack<T, kAligned>(normed, index, add.width, scale_pack<T, W>(h, w, scale, args.zero_centered));
    }
    before_next_row(row, args.add.rows);
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <typename T, typename W>
void (*add_rms_norm_kernel(const AddRmsNormArgs& args))(AddRmsNormArgs) {
  const bool aligned =
      add_aligned<T>(args.add) && rows_aligned<T>(args.normed, args.normed_stride) && rows_aligned<W>(args.weight, 0);
  const bool modes = args.add.modes.any();
  if (!aligned) {
    return modes ? add_rms_norm_reread_kernel<T, W, false, true> : add_rms_norm_reread_kernel<T, W, false, false>;
  }
  if (modes) return add_rms_norm_reread_kernel<T, W, true, true>;
  if (args.add.width == 0 || pack_count<T>(args.add.width) > kMaxThreadsPerRow * kPacksPerThread) {
    return add_rms_norm_reread_kernel<T, W, true, false>;
  }
  if (args.add.updates != nullptr) {
    return args.zero_centered ? add_rms_norm_resident_kernel<T, W, true, true>
                              : add_rms_norm_resident_kernel<T, W, false, true>;
  }
  return args.zero_centered ? add_rms_norm_resident_kernel<T, W, true, false>
                            : add_rms_norm_resident_kernel<T, W, false, false>;
}

template <typename Launch>
int launch_add_rms_norm(const AddRmsNormArgs& args, Launch&& launch) {
  if (args.add.rows == 0) return cudaSuccess;
  return with_dtype(args.add.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    auto kernel =
        args.weight_dtype == args.add.dtype ? add_rms_norm_kernel<T, T>(args) : add_rms_norm_kernel<T, float>(args);
    return launch_rows<T>(launch, kernel, args.add.rows, args.add.width, args);
  });
}

}  // namespace void_ext::kernels
