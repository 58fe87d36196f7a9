// add_l2norm: h = residual + update in float32, rounded to the rows' dtype; norms[row] = ||h|| of the rounded h, and on
// request updates[row] = ||h - residual||. A row is read once and written once.
// Mapping: a row to blockDim.x threads (common/reduce.cuh), which hold kPacksPerThread 16-byte packs of each operand at
// a time; all loads of a chunk are issued before the first sum. kModes: rows may be off, and a verdict on the layer is
// given from the row's history, which is walked while the row's loads are on their way.
#pragma once

#include <type_traits>

#include "../args.h"
#include "../rule.h"
#include "common/copy.cuh"
#include "common/reduce.cuh"

namespace void_ext::kernels {

// One row of the addition, chunk by chunk: the part that add_rms_norm shares.
template <typename T, bool kAligned, bool kUpdates, bool kModes>
struct AddRow {
  using Bits = typename Element<T>::Bits;

  const Bits* residual;
  const Bits* update;
  Bits* out;
  int64_t width;
  uint32_t packs;
  bool on = true;
  Squares stream, change;

  __device__ __forceinline__ AddRow(const AddL2NormArgs& args, int64_t row)
      : residual(static_cast<const Bits*>(args.residual) + row * args.residual_stride),
        update(static_cast<const Bits*>(args.update) + row * args.update_stride),
        out(static_cast<Bits*>(args.out) + row * args.out_stride),
        width(args.width),
        packs(pack_count<T>(args.width)) {
    if constexpr (kModes) on = args.modes.on == nullptr || args.modes.on[row * args.modes.on_stride];
  }

  // Adds packs first, first + blockDim.x, …; leaves them in `h`, rounded.
  __device__ __forceinline__ void add_chunk(uint32_t first, Pack (&h)[kPacksPerThread]) {
    Pack r[kPacksPerThread], u[kPacksPerThread] = {};
    load_packs<T, kAligned>(residual, first, packs, width, r);
    if (on) load_packs<T, kAligned>(update, first, packs, width, u);
#pragma unroll
    for (int k = 0; k < kPacksPerThread; ++k) {
      const uint32_t index = first + k * blockDim.x;
      float x[kPackSize<T>], y[kPackSize<T>];
      widen<T>(r[k], x);
      widen<T>(u[k], y);
#pragma unroll
      for (int i = 0; i < kPackSize<T>; ++i) y[i] = __fadd_rn(x[i], y[i]);
      h[k] = on ? narrow<T>(y) : r[k];  // a sum with zero would not keep the bits: -0.0, NaN payloads
      const bool in_row = index < packs;
      if (in_row) store_pack<T, kAligned>(out, index, width, h[k]);
      widen<T>(h[k], y);  // the norm is that of the stream as stored
      stream.add(k, y, in_row);
      if constexpr (kUpdates) {
#pragma unroll
        for (int i = 0; i < kPackSize<T>; ++i) y[i] = on ? __fsub_rn(y[i], x[i]) : 0.0f;
        change.add(k, y, in_row);
      }
    }
  }

  // The row's norms, written by its first thread; returns the sum of h's squares to all of them.
  __device__ __forceinline__ float finish(const AddL2NormArgs& args, int64_t row) {
    float sums[kUpdates ? 2 : 1];
    sums[0] = stream.total();
    if constexpr (kUpdates) sums[1] = change.total();
    row_sum(sums);
    if (threadIdx.x == 0) {
      if (args.norms != nullptr) args.norms[row * args.norms_stride] = __fsqrt_rn(sums[0]);
      if constexpr (kUpdates) {
        // Some kernels serve calls with update norms and without.
        if (args.updates != nullptr) args.updates[row * args.updates_stride] = __fsqrt_rn(sums[1]);
      }
    }
    return sums[0];
  }

  // The verdict on the layer, once its sum is known, and its consequences. Every thread has the same, and reads of
  // `out` the packs that it has written itself.
  __device__ __forceinline__ void judge(const AddL2NormArgs& args, int64_t row, const LacHistory& history, float sum) {
    const AddModes& modes = args.modes;
    if (!modes.judged()) return;
    const bool active = on && history.active(__fsqrt_rn(sum), modes.alpha);
    if (threadIdx.x == 0 && modes.active != nullptr) modes.active[row * modes.active_stride] = active;
    if (active && modes.kept != nullptr) {
      copy_row<T, kAligned>(out, static_cast<Bits*>(modes.kept) + row * modes.kept_stride, width, packs);
    }
  }
};

// What a row's history says before its new norm is known; nothing where no verdict is wanted.
__device__ __forceinline__ LacHistory history_of(const AddL2NormArgs& args, int64_t row) {
  const AddModes& modes = args.modes;
  const bool* executed = modes.executed == nullptr ? nullptr : modes.executed + row * modes.executed_stride;
  return LacHistory(args.norms + row * args.norms_stride - (modes.judged() ? modes.layer + 1 : 0), executed,
                    modes.judged() ? modes.layer : 0);
}

// Modes need more registers than two blocks leave each thread.
template <typename T, bool kAligned, bool kUpdates, bool kModes>
__global__ void __launch_bounds__(kMaxThreadsPerRow, kModes ? 1 : 2) add_l2norm_kernel(const AddL2NormArgs args) {
  wait_for_stream();
  for (int64_t row = first_row(); row < args.rows; row += row_step()) {
    AddRow<T, kAligned, kUpdates, kModes> add(args, row);
    for (uint32_t first = threadIdx.x; first < add.packs; first += kPacksPerThread * blockDim.x) {
      Pack h[kPacksPerThread];
      add.add_chunk(first, h);
    }
    let_next_begin();
    if constexpr (kModes) {
      const LacHistory history = history_of(args, row);
      add.judge(args, row, history, add.finish(args, row));
    } else {
      add.finish(args, row);
    }
    before_next_row(row, args.rows);
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <typename T>
bool add_aligned(const AddL2NormArgs& args) {
  return args.width % kPackSize<T> == 0 && rows_aligned<T>(args.residual, args.residual_stride) &&
         rows_aligned<T>(args.update, args.update_stride) && rows_aligned<T>(args.out, args.out_stride) &&
         (args.modes.kept == nullptr || rows_aligned<T>(args.modes.kept, args.modes.kept_stride));
}

template <typename Launch>
int launch_add_l2norm(const AddL2NormArgs& args, Launch&& launch) {
  if (args.rows == 0) return cudaSuccess;
  return with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    const auto choose = [&](auto aligned) {
      constexpr bool kAligned = decltype(aligned)::value;
      return args.modes.any() ? add_l2norm_kernel<T, kAligned, true, true>
             : args.updates   ? add_l2norm_kernel<T, kAligned, true, false>
                              : add_l2norm_kernel<T, kAligned, false, false>;
    };
    auto kernel = add_aligned<T>(args) ? choose(std::true_type{}) : choose(std::false_type{});
    return launch_rows<T>(launch, kernel, args.rows, args.width, args);
  });
}

}  // namespace void_ext::kernels
