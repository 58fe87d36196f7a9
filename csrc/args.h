// What an op hands to its kernels, CPU and CUDA alike: raw pointers, sizes, strides. Free of torch.
//
// Rows are addressed as pointer + row * stride; strides and sizes count elements and are int64. The elements of one row
// are contiguous. `norms` and `updates` already point at the column to be written.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace void_ext {

enum class DType : int { kFloat32, kFloat16, kBFloat16 };

// What an add does for chosen rows. A pointer that is null: not wanted.
struct AddModes {
  const bool* on;  // in rows that are off h = residual, bit for bit, and update is not read
  int64_t on_stride;
  int64_t layer;         // the layer that the sum closes; norms of 0 … layer stand before the column written
  const bool* executed;  // [row, 0 … layer): which of the layers before ran; null: all of them
  int64_t executed_stride;
  float alpha;
  bool* active;  // whether the layer was active for the row (rule.h); a row that is off was not
  int64_t active_stride;
  void* kept;  // kept[row] = h[row] where it was
  int64_t kept_stride;

  VOID_HOST_DEVICE bool any() const { return on != nullptr || judged(); }
  VOID_HOST_DEVICE bool judged() const { return active != nullptr || kept != nullptr; }
};

// h = residual + update;  norms[row] = ||h||;  updates[row] = ||h - residual||
struct AddL2NormArgs {
  DType dtype;
  int64_t rows, width;
  const void* residual;
  int64_t residual_stride;
  const void* update;
  int64_t update_stride;
  void* out;
  int64_t out_stride;
  float* norms;  // nullptr: not wanted; an add with an RMSNorm alone asks for that
  int64_t norms_stride;
  float* updates;  // nullptr: not wanted
  int64_t updates_stride;
  AddModes modes;
};

// AddL2NormArgs, then normed = round(round(h / rms(h)) * weight), or round(h / rms(h) * (1 + weight)) where that is
// zero-centred; rms(h) = sqrt(sum(h^2) / width + eps)
struct AddRmsNormArgs {
  AddL2NormArgs add;
  const void* weight;  // [width]
  DType weight_dtype;  // of the rows, or float32
  bool zero_centered;
  float eps;
  void* normed;
  int64_t normed_stride;
};

// norms[row] = ||stream||
struct RowL2NormArgs {
  DType dtype;
  int64_t rows, width;
  const void* stream;
  int64_t stream_stride;
  float* norms;
  int64_t norms_stride;
};

// Streams of one launch: their pointers and strides travel as the kernel's parameters, of which there is room for 4 KB.
constexpr int kMostStreams = 128;

// norms[row, i] = ||stream i||
struct StreamsL2NormArgs {
  DType dtype;
  int64_t rows, width;
  int64_t count;  // of streams, at most kMostStreams
  const void* stream[kMostStreams];
  int64_t stream_stride[kMostStreams];
  float* norms;
  int64_t norms_stride, column_stride;

  RowL2NormArgs one(int64_t i) const {
    return {dtype, rows, width, stream[i], stream_stride[i], norms + i * column_stride, norms_stride};
  }
};

// active[row, l] for every layer, from norms[row, 0 … layers]
struct VoidMaskArgs {
  int64_t rows, layers;
  const float* norms;
  int64_t norms_stride;
  const bool* executed;  // nullptr: every layer ran
  int64_t executed_stride;
  float alpha;
  bool* active;
  int64_t active_stride;
};

// kept[row] = stream[row] where `layer` was active by norms[row, 0 … layer + 1]; untouched elsewhere
struct ExitSelectArgs {
  DType dtype;
  int64_t rows, width;
  void* kept;
  int64_t kept_stride;
  const void* stream;
  int64_t stream_stride;
  const float* norms;
  int64_t norms_stride;
  int64_t layer;
  float alpha;
};

// h = residual + update where on[row], else residual
struct KeepRowsArgs {
  DType dtype;
  int64_t rows, width;
  const void* residual;
  int64_t residual_stride;
  const void* update;  // not read in rows that are off
  int64_t update_stride;
  const bool* on;
  int64_t on_stride;
  void* out;
  int64_t out_stride;
};

// index[0 … count): the rows that are on, ascending, -1 behind them;  inverse[row]: a row's place among them, or -1
struct CompactArgs {
  int64_t rows;
  const bool* on;
  int64_t on_stride;
  int64_t* index;
  int64_t* inverse;
  int64_t* count;
};

// out[i] = stream[index[i]] for i < min(count, capacity)
struct GatherRowsArgs {
  DType dtype;
  int64_t rows, width;
  const void* stream;
  int64_t stream_stride;
  const int64_t* index;
  int64_t index_stride;
  const int64_t* count;
  int64_t capacity;
  void* out;
  int64_t out_stride;
};

// stream[index[i]] = source[i] for i < min(count, capacity)
struct ScatterRowsArgs {
  DType dtype;
  int64_t rows, width;
  void* stream;
  int64_t stream_stride;
  const void* source;
  int64_t source_stride;
  const int64_t* index;
  int64_t index_stride;
  const int64_t* count;
  int64_t capacity;
};

}  // namespace void_ext
