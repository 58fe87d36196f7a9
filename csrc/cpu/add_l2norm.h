// One pass over a row: h = residual + update in the rows' dtype, ||h|| of what was stored, and on request
// ||h - residual||. Compiled once per instruction set, see row_kernels.cpp.
#pragma once

#include "../args.h"
#include "vec.h"

namespace void_ext::cpu {
namespace {

// Returns the row's sum of squares; `updates`, where wanted, receives ||h - residual||. kStream: h goes past the
// caches, for rows of `out` aligned to a vector.
template <typename T, bool kUpdates, bool kStream = false>
inline float add_row(const T* residual, const T* update, T* out, int64_t width, float* updates) {
  SumOfSquares squares, change;
  walk_row(
      width,
      [&](int64_t i, int chain) {
        const Vec before = load(residual + i);
        const Vec sum = before + load(update + i);
        const Vec after = kStream ? stream(out + i, sum) : store(out + i, sum);
        squares.add(after, chain);
        if constexpr (kUpdates) change.add(after - before, chain);
      },
      [&](int64_t i, int64_t count, int chain) {
        const Vec before = load_part(residual + i, count);
        const Vec after = store_part(out + i, before + load_part(update + i, count), count);
        squares.add(after, chain);
        if constexpr (kUpdates) change.add(after - before, chain);
      },
      [&] {
        squares.fold();
        if constexpr (kUpdates) change.fold();
      });
  if constexpr (kUpdates) *updates = __builtin_sqrtf(change.finish());
  return squares.finish();
}

// Whether h is better written past the caches: where it is larger than what they could keep for the next reader, a line
// fetched only to be overwritten is a third of an add's traffic. Measured on Zen 4, 4096 x 4096: 0.73 of the time.
template <typename T, typename Args>
inline bool streams(const Args& args) {
  constexpr int64_t kBytes = int64_t{16} << 20, kVector = kLanes * static_cast<int64_t>(sizeof(T));
  return args.rows * args.width * static_cast<int64_t>(sizeof(T)) >= kBytes && args.out_stride % kLanes == 0 &&
         reinterpret_cast<uintptr_t>(args.out) % kVector == 0;
}

template <typename T, bool kUpdates, bool kStream>
void add_l2norm_rows(const AddL2NormArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float sum = add_row<T, kUpdates, kStream>(static_cast<const T*>(args.residual) + row * args.residual_stride,
                                                    static_cast<const T*>(args.update) + row * args.update_stride,
                                                    static_cast<T*>(args.out) + row * args.out_stride, args.width,
                                                    kUpdates ? args.updates + row * args.updates_stride : nullptr);
    args.norms[row * args.norms_stride] = __builtin_sqrtf(sum);
  }
  if constexpr (kStream) drain_streams();  // before another thread is told that the rows are there
}

template <typename T>
void add_l2norm_typed(const AddL2NormArgs& args, int64_t begin, int64_t end) {
  if (args.updates != nullptr) {
    streams<T>(args) ? add_l2norm_rows<T, true, true>(args, begin, end)
                     : add_l2norm_rows<T, true, false>(args, begin, end);
  } else {
    streams<T>(args) ? add_l2norm_rows<T, false, true>(args, begin, end)
                     : add_l2norm_rows<T, false, false>(args, begin, end);
  }
}

void add_l2norm(const AddL2NormArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32:
      return add_l2norm_typed<float>(args, begin, end);
    case DType::kFloat16:
      return add_l2norm_typed<Float16>(args, begin, end);
    case DType::kBFloat16:
      return add_l2norm_typed<BFloat16>(args, begin, end);
  }
}

}  // namespace
}  // namespace void_ext::cpu
