// One pass over a row: h = residual + update in the rows' dtype, ||h|| of what was stored, and on request
// ||h - residual||. Compiled once per instruction set, see row_kernels.cpp.
#pragma once

#include "../args.h"
#include "vec.h"

namespace void_ext::cpu {
namespace {

// Returns the row's sum of squares; `updates`, where wanted, receives ||h - residual||.
template <typename T, bool kUpdates>
inline float add_row(const T* residual, const T* update, T* out, int64_t width, float* updates) {
  SumOfSquares stream, change;
  walk_row(
      width,
      [&](int64_t i, int chain) {
        const Vec before = load(residual + i);
        const Vec after = store(out + i, before + load(update + i));
        stream.add(after, chain);
        if constexpr (kUpdates) change.add(after - before, chain);
      },
      [&](int64_t i, int64_t count, int chain) {
        const Vec before = load_part(residual + i, count);
        const Vec after = store_part(out + i, before + load_part(update + i, count), count);
        stream.add(after, chain);
        if constexpr (kUpdates) change.add(after - before, chain);
      },
      [&] {
        stream.fold();
        if constexpr (kUpdates) change.fold();
      });
  if constexpr (kUpdates) *updates = __builtin_sqrtf(change.finish());
  return stream.finish();
}

template <typename T, bool kUpdates>
void add_l2norm_rows(const AddL2NormArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float sum = add_row<T, kUpdates>(static_cast<const T*>(args.residual) + row * args.residual_stride,
                                           static_cast<const T*>(args.update) + row * args.update_stride,
                                           static_cast<T*>(args.out) + row * args.out_stride, args.width,
                                           kUpdates ? args.updates + row * args.updates_stride : nullptr);
    args.norms[row * args.norms_stride] = __builtin_sqrtf(sum);
  }
}

void add_l2norm(const AddL2NormArgs& args, int64_t begin, int64_t end) {
  const bool updates = args.updates != nullptr;
  switch (args.dtype) {
    case DType::kFloat32:
      return updates ? add_l2norm_rows<float, true>(args, begin, end) : add_l2norm_rows<float, false>(args, begin, end);
    case DType::kFloat16:
      return updates ? add_l2norm_rows<Float16, true>(args, begin, end)
                     : add_l2norm_rows<Float16, false>(args, begin, end);
    case DType::kBFloat16:
      return updates ? add_l2norm_rows<BFloat16, true>(args, begin, end)
                     : add_l2norm_rows<BFloat16, false>(args, begin, end);
  }
}

}  // namespace
}  // namespace void_ext::cpu
