// The CUDA side of launch.h: each op's launch plan stands beside its kernel; here it meets the runtime.
#include <cuda_runtime.h>

#include <atomic>

#include "kernels/add_l2norm.cuh"
#include "kernels/add_rms_norm.cuh"
#include "kernels/compact.cuh"
#include "kernels/exit_select.cuh"
#include "kernels/gather_rows.cuh"
#include "kernels/keep_rows.cuh"
#include "kernels/row_l2norm.cuh"
#include "kernels/scatter_rows.cuh"
#include "kernels/streams_l2norm.cuh"
#include "kernels/void_mask.cuh"
#include "launch.h"

namespace void_ext::cuda {

namespace {

LaunchTuning tuning;

constexpr int kMostDevices = 64;

int multiprocessors(int device) {
  int count = 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 0;
}

// Whether the code that runs on the current device waits for the kernel ahead (wait_for_stream): all kernels are
// compiled for the same architectures, so one speaks for all. Not the device's architecture: it may run code of an
// older one.
bool waits(int device) {
  static std::atomic<int> known[kMostDevices];  // 0: not asked yet, 1: no, 2: yes
  if (device < 0 || device >= kMostDevices) return false;
  int answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    cudaFuncAttributes code{};
    const bool asked = cudaFuncGetAttributes(&code, kernels::void_mask_kernel) == cudaSuccess;
    if (!asked) (void)cudaGetLastError();
    answer = asked && code.ptxVersion >= 90 ? 2 : 1;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer == 2;
}

struct Launcher {
  void* stream;

  template <typename Args>
  int operator()(void (*kernel)(Args), dim3 grid, dim3 block, const Args& args) const {
    int device = -1;
    if (cudaGetDevice(&device) != cudaSuccess) (void)cudaGetLastError();
    if (tuning.blocks_per_multiprocessor > 0) {
      const int64_t most = tuning.blocks_per_multiprocessor * multiprocessors(device);
      if (most > 0 && grid.x > most) grid.x = static_cast<unsigned>(most);
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute early{};
    if (tuning.dependent && waits(device)) {
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

int streams_l2norm(const StreamsL2NormArgs& args, void* stream) {
  return kernels::launch_streams_l2norm(args, Launcher{stream});
}

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
