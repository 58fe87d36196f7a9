// What an op hands to its kernels, CPU and CUDA alike: raw pointers, sizes, strides. Free of torch.
//
// Rows are addressed as pointer + row * stride; strides and sizes count elements and are int64. The elements of one row
// are contiguous. `norms` and `updates` already point at the column to be written.
#pragma once

#include <cstdint>

namespace void_ext {

enum class DType : int { kFloat32, kFloat16, kBFloat16 };

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
  float* norms;
  int64_t norms_stride;
  float* updates;  // nullptr: not wanted
  int64_t updates_stride;
};

// AddL2NormArgs, then normed = round(h / rms(h)) * weight, rms(h) = sqrt(sum(h^2) / width + eps)
struct AddRmsNormArgs {
  AddL2NormArgs add;
  const void* weight;  // [width], same dtype as the rows
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

}  // namespace void_ext
