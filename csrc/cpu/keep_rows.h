// h = residual + update in the rows that are on, residual elsewhere, where update is not read. Compiled once per
// instruction set, see row_kernels.cpp.
#pragma once

#include "../args.h"
#include "add_l2norm.h"
#include "vec.h"

namespace void_ext::cpu {
namespace {

template <typename T, bool kStream>
void keep_rows_as(const KeepRowsArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* residual = static_cast<const T*>(args.residual) + row * args.residual_stride;
    T* out = static_cast<T*>(args.out) + row * args.out_stride;
    if (!args.on[row * args.on_stride]) {
      std::memcpy(out, residual, static_cast<size_t>(args.width) * sizeof(T));
      continue;
    }
    const T* update = static_cast<const T*>(args.update) + row * args.update_stride;
    int64_t i = 0;
    for (; args.width - i >= kLanes; i += kLanes) {
      const Vec sum = load(residual + i) + load(update + i);
      kStream ? stream(out + i, sum) : store(out + i, sum);
    }
    if (const int64_t rest = args.width - i; rest > 0) {
      store_part(out + i, load_part(residual + i, rest) + load_part(update + i, rest), rest);
    }
  }
  if constexpr (kStream) drain_streams();  // before another thread is told that the rows are there
}

template <typename T>
void keep_rows_typed(const KeepRowsArgs& args, int64_t begin, int64_t end) {
  streams<T>(args) ? keep_rows_as<T, true>(args, begin, end) : keep_rows_as<T, false>(args, begin, end);
}

void keep_rows(const KeepRowsArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32:
      return keep_rows_typed<float>(args, begin, end);
    case DType::kFloat16:
      return keep_rows_typed<Float16>(args, begin, end);
    case DType::kBFloat16:
      return keep_rows_typed<BFloat16>(args, begin, end);
  }
}

}  // namespace
}  // namespace void_ext::cpu
