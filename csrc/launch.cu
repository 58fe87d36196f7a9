// The CUDA side of launch.h: each op's launch plan stands beside its kernel; here it meets the runtime.
#include <cuda_runtime.h>

#include "kernels/add_l2norm.cuh"
#include "kernels/add_rms_norm.cuh"
#include "kernels/compact.cuh"
#include "kernels/exit_select.cuh"
#include "kernels/gather_rows.cuh"
#include "kernels/keep_rows.cuh"
#include "kernels/row_l2norm.cuh"
#include "kernels/scatter_rows.cuh"
#include "kernels/void_mask.cuh"
#include "launch.h"

namespace void_ext::cuda {

namespace {

struct Launcher {
  void* stream;

  template <typename Args>
  int operator()(void (*kernel)(Args), dim3 grid, dim3 block, const Args& args) const {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = static_cast<cudaStream_t>(stream);
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
    if (error != cudaSuccess) (void)cudaGetLastError();  // reported by us, so not left for the next caller to find
    return error;
  }
};

}  // namespace

int add_l2norm(const AddL2NormArgs& args, void* stream) { return kernels::launch_add_l2norm(args, Launcher{stream}); }

int add_rms_norm(const AddRmsNormArgs& args, void* stream) {
  return kernels::launch_add_rms_norm(args, Launcher{stream});
}

int row_l2norm(const RowL2NormArgs& args, void* stream) { return kernels::launch_row_l2norm(args, Launcher{stream}); }

int void_mask(const VoidMaskArgs& args, void* stream) { return kernels::launch_void_mask(args, Launcher{stream}); }

int exit_select(const ExitSelectArgs& args, void* stream) {
  return kernels::launch_exit_select(args, Launcher{stream});
}

int keep_rows(const KeepRowsArgs& args, void* stream) { return kernels::launch_keep_rows(args, Launcher{stream}); }

int compact(const CompactArgs& args, void* stream) { return kernels::launch_compact(args, Launcher{stream}); }

int gather_rows(const GatherRowsArgs& args, void* stream) {
  return kernels::launch_gather_rows(args, Launcher{stream});
}

int scatter_rows(const ScatterRowsArgs& args, void* stream) {
  return kernels::launch_scatter_rows(args, Launcher{stream});
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

DeviceGuard::DeviceGuard(int device) : previous_(-1) {
  int current = -1;
  if (cudaGetDevice(&current) == cudaSuccess && current != device && cudaSetDevice(device) == cudaSuccess) {
    previous_ = current;
  }
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) (void)cudaSetDevice(previous_);
}

}  // namespace void_ext::cuda
