// The seam between the ops and the CUDA kernels: plain C++ signatures, no CUDA and no torch headers.
//
// Each function enqueues on `stream` (a cudaStream_t) of the current device and returns the cudaError_t of the launch,
// 0 when all is well; error_string() names it. Callers have checked every argument; no rows or no width means no launch
// where nothing is to be written.
#pragma once

#include "args.h"

namespace void_ext::cuda {

int add_l2norm(const AddL2NormArgs& args, void* stream);
int add_rms_norm(const AddRmsNormArgs& args, void* stream);
int row_l2norm(const RowL2NormArgs& args, void* stream);
int streams_l2norm(const StreamsL2NormArgs& args, void* stream);
int void_mask(const VoidMaskArgs& args, void* stream);
int exit_select(const ExitSelectArgs& args, void* stream);
int keep_rows(const KeepRowsArgs& args, void* stream);
int compact(const CompactArgs& args, void* stream);
int gather_rows(const GatherRowsArgs& args, void* stream);
int scatter_rows(const ScatterRowsArgs& args, void* stream);

const char* error_string(int error);

// How kernels are launched. The defaults are what users get; bench/ changes them to compare.
struct LaunchTuning {
  // 0: a block for each row, or group of rows; n: at most n blocks for each multiprocessor, which walk the rows.
  int64_t blocks_per_multiprocessor = 0;
  // Whether kernels may begin before the one ahead of them in the stream has ended (programmatic dependent launch,
  // sm_90 and newer); they wait for its results before they read.
  bool dependent = true;
};
void tune_launches(const LaunchTuning& tuning);

// Makes `device` current and restores the previous one when destroyed.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
};

}  // namespace void_ext::cuda
