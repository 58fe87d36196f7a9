// The CUDA side of launch.h: each op's launch plan stands beside its kernel; here it meets the runtime.
#include <cuda_runtime.h>

#include <vector>

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

LaunchTuning tuning;

struct Device {
  int multiprocessors = 0, major = 0;
};

// The current device, asked once.
Device current_device() {
  static const std::vector<Device> devices = [] {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
    std::vector<Device> found(count);
    for (int device = 0; device < count; ++device) {
      (void)cudaDeviceGetAttribute(&found[device].multiprocessors, cudaDevAttrMultiProcessorCount, device);
      (void)cudaDeviceGetAttribute(&found[device].major, cudaDevAttrComputeCapabilityMajor, device);
    }
    return found;
  }();
  int device = -1;
  if (cudaGetDevice(&device) != cudaSuccess) return {};
  return device >= 0 && device < static_cast<int>(devices.size()) ? devices[device] : Device{};
}

struct Launcher {
  void* stream;

  template <typename Args>
  int operator()(void (*kernel)(Args), dim3 grid, dim3 block, const Args& args) const {
    const Device device = current_device();
    const int64_t most = tuning.blocks_per_multiprocessor * device.multiprocessors;
    if (most > 0 && grid.x > most) grid.x = static_cast<unsigned>(most);
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute early{};
    if (tuning.dependent && device.major >= 9) {
      early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      early.val.programmaticStreamSerializationAllowed = 1;
      config.attrs = &early;
      config.numAttrs = 1;
    }
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
    if (error != cudaSuccess) (void)cudaGetLastError();  // reported by us, so not left for the next caller to find
    return error;
  }
};

}  // namespace

void tune_launches(const LaunchTuning& wanted) { tuning = wanted; }

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
