// One pass over a row: h = residual + update in the rows' dtype, ||h|| of what was stored, and on request
// ||h - residual||. Compiled once per instruction set, see row_kernels.cpp.
#pragma once

#include "../args.h"
#include "../rule.h"
#include "row_l2norm.h"
#include "vec.h"

namespace void_ext::cpu {
namespace {

// Where h goes: to memory; past the caches, for rows of `out` aligned to a vector; or there and, widened for a second
// pass to read, to `copy`.
enum class Write { kPlain, kPast, kPastAndCopy };

// Returns the row's sum of squares; `updates`, where wanted, receives ||h - residual||.
template <typename T, bool kUpdates, Write kWrite = Write::kPlain>
inline float add_row(const T* residual, const T* update, T* out, int64_t width, float* updates, float* copy = nullptr) {
  SumOfSquares squares, change;
  walk_row(
      width,
      [&](int64_t i, int chain) {
        const Vec before = load(residual + i);
        const Vec sum = before + load(update + i);
        const Vec after = kWrite != Write::kPlain ? stream(out + i, sum) : store(out + i, sum);
        if constexpr (kWrite == Write::kPastAndCopy) lanes(copy + i, after);
        squares.add(after, chain);
        if constexpr (kUpdates) change.add(after - before, chain);
      },
      [&](int64_t i, int64_t count, int chain) {
        const Vec before = load_part(residual + i, count);
        const Vec after = store_part(out + i, before + load_part(update + i, count), count);
        if constexpr (kWrite == Write::kPastAndCopy) store_part(copy + i, after, count);
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

template <typename T>
inline void widen_row(const T* row, float* copy, int64_t width) {
  int64_t i = 0;
  for (; width - i >= kLanes; i += kLanes) lanes(copy + i, load(row + i));
  if (i < width) store_part(copy + i, load_part(row + i, width - i), width - i);
}

// What a layer's closing add does with one row, whether or not it is on: h, its norm, and the verdict on the layer.
template <typename T, bool kUpdates, Write kWrite = Write::kPlain>
inline float add_row_of(const AddL2NormArgs& args, int64_t row, float* copy = nullptr) {
  const AddModes& modes = args.modes;
  const T* residual = static_cast<const T*>(args.residual) + row * args.residual_stride;
  T* out = static_cast<T*>(args.out) + row * args.out_stride;
  const bool on = modes.on == nullptr || modes.on[row * modes.on_stride];
  float sum;
  if (on) {
    sum = add_row<T, kUpdates, kWrite>(residual, static_cast<const T*>(args.update) + row * args.update_stride, out,
                                       args.width, kUpdates ? args.updates + row * args.updates_stride : nullptr, copy);
  } else {
    if (out != residual) std::memcpy(out, residual, static_cast<size_t>(args.width) * sizeof(T));
    if constexpr (kWrite == Write::kPastAndCopy) {
      widen_row(residual, copy, args.width);
    }
    sum = row_squares(out, args.width);
    if constexpr (kUpdates) args.updates[row * args.updates_stride] = 0.0f;
  }
  float* norm = args.norms + row * args.norms_stride;
  if (args.norms != nullptr) *norm = __builtin_sqrtf(sum);
  if (modes.judged()) {
    const bool* executed = modes.executed == nullptr ? nullptr : modes.executed + row * modes.executed_stride;
    const bool active = on && layer_active(norm - modes.layer - 1, executed, modes.layer, modes.alpha);
    if (modes.active != nullptr) modes.active[row * modes.active_stride] = active;
    if (modes.kept != nullptr && active) {
      std::memcpy(static_cast<T*>(modes.kept) + row * modes.kept_stride, out,
                  static_cast<size_t>(args.width) * sizeof(T));
    }
  }
  return sum;
}

// Whether h is better written past the caches: where it is larger than what they could keep for the next reader, a line
// fetched only to be overwritten is a third of an add's traffic. Measured on Zen 4, 4096 x 4096: 0.73 of the time.
template <typename T>
inline bool past_caches(int64_t rows, int64_t width, const void* out, int64_t stride) {
  constexpr int64_t kBytes = int64_t{16} << 20, kVector = kLanes * static_cast<int64_t>(sizeof(T));
  return rows * width * static_cast<int64_t>(sizeof(T)) >= kBytes && stride % kLanes == 0 &&
         reinterpret_cast<uintptr_t>(out) % kVector == 0;
}
template <typename T, typename Args>
inline bool streams(const Args& args) {
  return past_caches<T>(args.rows, args.width, args.out, args.out_stride);
}

template <typename T, bool kUpdates, Write kWrite>
void add_l2norm_rows(const AddL2NormArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) add_row_of<T, kUpdates, kWrite>(args, row);
  if constexpr (kWrite != Write::kPlain) drain_streams();  // before another thread is told that the rows are there
}

template <typename T>
void add_l2norm_typed(const AddL2NormArgs& args, int64_t begin, int64_t end) {
  if (args.updates != nullptr) {
    streams<T>(args) ? add_l2norm_rows<T, true, Write::kPast>(args, begin, end)
                     : add_l2norm_rows<T, true, Write::kPlain>(args, begin, end);
  } else {
    streams<T>(args) ? add_l2norm_rows<T, false, Write::kPast>(args, begin, end)
                     : add_l2norm_rows<T, false, Write::kPlain>(args, begin, end);
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
