// ||stream|| of every row, in the order of add_l2norm's sum, so that both give the same bits for the same row.
#pragma once

#include "../args.h"
#include "vec.h"

namespace void_ext::cpu {
namespace {

template <typename T>
inline float row_squares(const T* row, int64_t width) {
  SumOfSquares sum;
  walk_row(
      width, [&](int64_t i, int chain) { sum.add(load(row + i), chain); },
      [&](int64_t i, int64_t count, int chain) { sum.add(load_part(row + i, count), chain); }, [&] { sum.fold(); });
  return sum.finish();
}

template <typename T>
void row_l2norm_rows(const RowL2NormArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* stream = static_cast<const T*>(args.stream) + row * args.stream_stride;
    args.norms[row * args.norms_stride] = __builtin_sqrtf(row_squares(stream, args.width));
  }
}

void row_l2norm(const RowL2NormArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32:
      return row_l2norm_rows<float>(args, begin, end);
    case DType::kFloat16:
      return row_l2norm_rows<Float16>(args, begin, end);
    case DType::kBFloat16:
      return row_l2norm_rows<BFloat16>(args, begin, end);
  }
}

}  // namespace
}  // namespace void_ext::cpu
