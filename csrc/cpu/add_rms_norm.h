// Two passes over a row, the second out of cache: add_l2norm, then normed = round(h * rsqrt(sum(h^2) / width + eps)) *
// weight, both roundings to the rows' dtype, in the order of Hugging Face's LlamaRMSNorm.
#pragma once

#include "add_l2norm.h"

namespace void_ext::cpu {
namespace {

template <typename T>
inline void normalise_row(const T* h, const T* weight, T* normed, int64_t width, float inverse) {
  const Vec scale = splat(inverse);
  int64_t i = 0;
  for (; width - i >= kLanes; i += kLanes) {
    store(normed + i, load(weight + i) * rounded(load(h + i) * scale, h));
  }
  if (i < width) {
    const int64_t count = width - i;
    store_part(normed + i, load_part(weight + i, count) * rounded(load_part(h + i, count) * scale, h), count);
  }
}

template <typename T, bool kUpdates>
void add_rms_norm_rows(const AddRmsNormArgs& args, int64_t begin, int64_t end) {
  const AddL2NormArgs& add = args.add;
  for (int64_t row = begin; row < end; ++row) {
    T* h = static_cast<T*>(add.out) + row * add.out_stride;
    const float sum = add_row<T, kUpdates>(static_cast<const T*>(add.residual) + row * add.residual_stride,
                                           static_cast<const T*>(add.update) + row * add.update_stride, h, add.width,
                                           kUpdates ? add.updates + row * add.updates_stride : nullptr);
    add.norms[row * add.norms_stride] = __builtin_sqrtf(sum);
    const float inverse = 1.0f / __builtin_sqrtf(sum / static_cast<float>(add.width) + args.eps);
    normalise_row(h, static_cast<const T*>(args.weight), static_cast<T*>(args.normed) + row * args.normed_stride,
                  add.width, inverse);
  }
}

void add_rms_norm(const AddRmsNormArgs& args, int64_t begin, int64_t end) {
  const bool updates = args.add.updates != nullptr;
  switch (args.add.dtype) {
    case DType::kFloat32:
      return updates ? add_rms_norm_rows<float, true>(args, begin, end)
                     : add_rms_norm_rows<float, false>(args, begin, end);
    case DType::kFloat16:
      return updates ? add_rms_norm_rows<Float16, true>(args, begin, end)
                     : add_rms_norm_rows<Float16, false>(args, begin, end);
    case DType::kBFloat16:
      return updates ? add_rms_norm_rows<BFloat16, true>(args, begin, end)
                     : add_rms_norm_rows<BFloat16, false>(args, begin, end);
  }
}

}  // namespace
}  // namespace void_ext::cpu
