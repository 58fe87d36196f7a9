// Two passes over a row, the second out of cache: add_l2norm, then normed = round(round(h * s) * weight) with s =
// rsqrt( sum(h^2) / width + eps), in the order of Hugging Face's LlamaRMSNorm; or round(h * s * (1 + weight)), as its
// GemmaRMSNorm, whose weight is zero-centred.
#pragma once

#include "add_l2norm.h"

namespace void_ext::cpu {
namespace {

template <typename T, typename W, bool kZeroCentered>
inline Vec scaled(Vec h, Vec weight, float inverse) {
  const Vec direction = h * splat(inverse);
  if constexpr (kZeroCentered) return direction * (splat(1.0f) + weight);
  return weight * rounded(direction, static_cast<const T*>(nullptr));
}

// kStream: normed goes past the caches. `next`: operands of the row after, or null; fetching them while this pass
// computes lets memory and arithmetic work at the same time.
template <typename T, typename W, bool kZeroCentered, bool kStream, typename H>
inline void normalise_row(const H* h, const W* weight, T* normed, int64_t width, float inverse, const T* const* next) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  int64_t i = 0;
  for (; width - i >= kLanes; i += kLanes) {
    if constexpr (kStream) {
      if (i % kLine == 0) {
        __builtin_prefetch(next[0] + i);
        __builtin_prefetch(next[1] + i);
      }
    }
    const Vec x = scaled<T, W, kZeroCentered>(load(h + i), load(weight + i), inverse);
    kStream ? stream(normed + i, x) : store(normed + i, x);
  }
  if (i < width) {
    const int64_t count = width - i;
    const Vec x = scaled<T, W, kZeroCentered>(load_part(h + i, count), load_part(weight + i, count), inverse);
    store_part(normed + i, x, count);
  }
}

// Rows of up to this width are kept for the second pass in a buffer, which the first two levels of cache hold.
constexpr int64_t kKept = 16384;

// kStream: both outputs go past the caches.
template <typename T, typename W, bool kZeroCentered, bool kUpdates, bool kStream>
void add_rms_norm_rows(const AddRmsNormArgs& args, int64_t begin, int64_t end) {
  const AddL2NormArgs& add = args.add;
  alignas(64) float kept[kStream ? kKept : 1];
  for (int64_t row = begin; row < end; ++row) {
    const float sum = add_row_of<T, kUpdates, kStream ? Write::kPastAndCopy : Write::kPlain>(add, row, kept);
    const float inverse = 1.0f / __builtin_sqrtf(sum / static_cast<float>(add.width) + args.eps);
    const W* weight = static_cast<const W*>(args.weight);
    T* normed = static_cast<T*>(args.normed) + row * args.normed_stride;
    if constexpr (kStream) {
      const int64_t after = row + 1 < end ? row + 1 : row;
      const T* next[] = {static_cast<const T*>(add.residual) + after * add.residual_stride,
                         static_cast<const T*>(add.update) + after * add.update_stride};
      normalise_row<T, W, kZeroCentered, true>(kept, weight, normed, add.width, inverse, next);
    } else {
      const T* h = static_cast<const T*>(add.out) + row * add.out_stride;
      normalise_row<T, W, kZeroCentered, false>(h, weight, normed, add.width, inverse, nullptr);
    }
  }
  if constexpr (kStream) drain_streams();  // before another thread is told that the rows are there
}

template <typename T, typename W, bool kZeroCentered>
void add_rms_norm_as(const AddRmsNormArgs& args, int64_t begin, int64_t end) {
  const bool past = args.add.width <= kKept && streams<T>(args.add) &&
                    past_caches<T>(args.add.rows, args.add.width, args.normed, args.normed_stride);
  if (args.add.updates != nullptr) {
    past ? add_rms_norm_rows<T, W, kZeroCentered, true, true>(args, begin, end)
         : add_rms_norm_rows<T, W, kZeroCentered, true, false>(args, begin, end);
  } else {
    past ? add_rms_norm_rows<T, W, kZeroCentered, false, true>(args, begin, end)
         : add_rms_norm_rows<T, W, kZeroCentered, false, false>(args, begin, end);
  }
}

template <typename T>
void add_rms_norm_typed(const AddRmsNormArgs& args, int64_t begin, int64_t end) {
  if (args.weight_dtype == DType::kFloat32) {
    args.zero_centered ? add_rms_norm_as<T, float, true>(args, begin, end)
                       : add_rms_norm_as<T, float, false>(args, begin, end);
  } else {
    args.zero_centered ? add_rms_norm_as<T, T, true>(args, begin, end) : add_rms_norm_as<T, T, false>(args, begin, end);
  }
}

void add_rms_norm(const AddRmsNormArgs& args, int64_t begin, int64_t end) {
  switch (args.add.dtype) {
    case DType::kFloat32:
      return add_rms_norm_typed<float>(args, begin, end);
    case DType::kFloat16:
      return add_rms_norm_typed<Float16>(args, begin, end);
    case DType::kBFloat16:
      return add_rms_norm_typed<BFloat16>(args, begin, end);
  }
}

}  // namespace
}  // namespace void_ext::cpu
