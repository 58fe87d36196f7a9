// Compiled in a build with CUDA. Needs no CUDA header: the kernels are behind launch.h, the stream comes from torch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>

#include "../launch.h"
#include "device.h"

// Weak, because a torch without CUDA has no such function and the same binary must load there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

// For bench/launches.py alone, which finds it by its name.
extern "C" __attribute__((visibility("default"))) void void_ext_tune_launches(int64_t blocks_per_multiprocessor,
                                                                              int dependent) {
  void_ext::cuda::tune_launches({blocks_per_multiprocessor, dependent != 0});
}

namespace void_ext {

namespace {

void* current_stream(const View& view) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    fail(view.op, view.name, "is on ", view.device(),
         ", but the torch that is loaded has no CUDA; install one that has");
  }
  if (aoti_torch_get_current_cuda_stream(view.device_index, &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error(std::string("void_ext::") + view.op + ": torch gave no current stream of " +
                             view.device());
  }
  return stream;
}

template <typename Args>
void enqueue(const View& view, int (*launch)(const Args&, void*), const Args& args) {
  const cuda::DeviceGuard guard(view.device_index);
  if (const int error = launch(args, current_stream(view)); error != 0) {
    throw std::runtime_error(std::string("void_ext::") + view.op + ": the launch on " + view.device() +
                             " failed: " + cuda::error_string(error));
  }
}

}  // namespace

void Cuda::require(const View&) {}
void Cuda::run(const View& view, const AddL2NormArgs& args) { enqueue(view, cuda::add_l2norm, args); }
void Cuda::run(const View& view, const AddRmsNormArgs& args) { enqueue(view, cuda::add_rms_norm, args); }
void Cuda::run(const View& view, const RowL2NormArgs& args) { enqueue(view, cuda::row_l2norm, args); }
void Cuda::run(const View& view, const StreamsL2NormArgs& args) { enqueue(view, cuda::streams_l2norm, args); }
void Cuda::run(const View& view, const VoidMaskArgs& args) { enqueue(view, cuda::void_mask, args); }
void Cuda::run(const View& view, const ExitSelectArgs& args) { enqueue(view, cuda::exit_select, args); }
void Cuda::run(const View& view, const KeepRowsArgs& args) { enqueue(view, cuda::keep_rows, args); }
void Cuda::run(const View& view, const CompactArgs& args) { enqueue(view, cuda::compact, args); }
void Cuda::run(const View& view, const GatherRowsArgs& args) { enqueue(view, cuda::gather_rows, args); }
void Cuda::run(const View& view, const ScatterRowsArgs& args) { enqueue(view, cuda::scatter_rows, args); }

}  // namespace void_ext
