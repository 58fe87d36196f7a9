// Where an op runs, once its arguments are checked. Cpu spreads the rows over torch's threads; Cuda enqueues on the
// current stream of the tensor's device through launch.h or, in a build without CUDA, says so.
#pragma once

#include "../args.h"
#include "checks.h"

namespace void_ext {

struct Cpu {
  static void require(const View&) {}
  // Throws where one of the first min(count, capacity) indices is no row of `rows`, or the count is negative.
  static void check_indices(const View& index, const View& count, int64_t capacity, int64_t rows);
  // A new contiguous tensor of the shape, dtype and device of `like`, for every element to be written.
  static Tensor new_like(const View& like);
  static void run(const View&, const AddL2NormArgs& args);
  static void run(const View&, const AddRmsNormArgs& args);
  static void run(const View&, const RowL2NormArgs& args);
  static void run(const View&, const StreamsL2NormArgs& args);
  static void run(const View&, const VoidMaskArgs& args);
  static void run(const View&, const ExitSelectArgs& args);
  static void run(const View&, const KeepRowsArgs& args);
  static void run(const View&, const CompactArgs& args);
  static void run(const View&, const GatherRowsArgs& args);
  static void run(const View&, const ScatterRowsArgs& args);
};

struct Cuda {
  // Throws in a build without CUDA, before anything is allocated.
  static void require(const View& view);
  // Nothing: indices and count are on the device, and reading them would wait for it.
  static void check_indices(const View&, const View&, int64_t, int64_t) {}
  static Tensor new_like(const View& like) { return void_ext::new_like(like); }
  static void run(const View& view, const AddL2NormArgs& args);
  static void run(const View& view, const AddRmsNormArgs& args);
  static void run(const View& view, const RowL2NormArgs& args);
  static void run(const View& view, const StreamsL2NormArgs& args);
  static void run(const View& view, const VoidMaskArgs& args);
  static void run(const View& view, const ExitSelectArgs& args);
  static void run(const View& view, const KeepRowsArgs& args);
  static void run(const View& view, const CompactArgs& args);
  static void run(const View& view, const GatherRowsArgs& args);
  static void run(const View& view, const ScatterRowsArgs& args);
};

}  // namespace void_ext
