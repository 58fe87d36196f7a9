// The CUDA kernels on the CPU, behind a C interface for ctypes: the same .cuh files and launch plans as launch.cu, with
// fibers for threads. Every function returns 0, a cudaError_t, or -1 with void_shim_error() saying what went wrong.
#include <exception>
#include <limits>
#include <string>

#include "../kernels/add_l2norm.cuh"
#include "../kernels/add_rms_norm.cuh"
#include "../kernels/compact.cuh"
#include "../kernels/exit_select.cuh"
#include "../kernels/gather_rows.cuh"
#include "../kernels/keep_rows.cuh"
#include "../kernels/row_l2norm.cuh"
#include "../kernels/scatter_rows.cuh"
#include "../kernels/streams_l2norm.cuh"
#include "../kernels/void_mask.cuh"
#include "cuda_runtime.h"

namespace void_ext::hostshim {
namespace {

std::string last_error;
int64_t max_grid = std::numeric_limits<int64_t>::max();
bool last_warp_first = false;
dim3 last_block;

struct Launcher {
  template <typename Args>
  int operator()(void (*kernel)(Args), dim3 grid, dim3 block, const Args& args) const {
    if (grid.x > max_grid) grid.x = static_cast<unsigned>(max_grid);
    last_block = block;
    run_grid(grid, block, last_warp_first, [&] { kernel(args); });
    return 0;
  }
};

template <typename Body>
int guarded(Body&& body) {
  try {
    return body();
  } catch (const std::exception& error) {
    last_error = error.what();
    return -1;
  }
}

// Kernels that are wrong on purpose: the shim must notice.
struct Faulty {
  int fault;
  float* out;
};

void faulty_kernel(Faulty args) {
  __shared__ float shared[1];
  if (args.fault == 0 && threadIdx.x == 5) return;  // a barrier that one thread never reaches
  if (args.fault == 1 && threadIdx.x < 32) __syncthreads();
  if (args.fault == 2 && threadIdx.x == 40) return;  // a shuffle that one lane never reaches
  if (args.fault == 2) shared[0] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  if (args.fault == 3) shared[0] = __shfl_xor_sync(0xffffffffu, 1.0f, 32);  // a lane that does not exist
  if (args.fault == 4 && threadIdx.x == 0) args.out[0] = shared[0];         // read before anybody wrote
  if (args.fault == 5 && threadIdx.x == 63) shared[0] = 1.0f;               // read without a barrier in between
  if (args.fault == 5 && threadIdx.x == 0) args.out[0] = shared[0];
  __syncthreads();
}

}  // namespace
}  // namespace void_ext::hostshim

using namespace void_ext;
using namespace void_ext::hostshim;

extern "C" {

const char* void_shim_error() { return last_error.c_str(); }

// Blocks a launch may have, so that kernels must loop over rows, and the order in which warps and lanes run.
void void_shim_configure(int64_t grid_limit, int run_last_warp_first) {
  max_grid = grid_limit;
  last_warp_first = run_last_warp_first != 0;
}

int void_shim_threads_per_row() { return static_cast<int>(last_block.x); }

int void_shim_add_l2norm(int dtype, int64_t rows, int64_t width, const void* residual, int64_t residual_stride,
                         const void* update, int64_t update_stride, void* out, int64_t out_stride, float* norms,
                         int64_t norms_stride, float* updates, int64_t updates_stride, const AddModes* modes) {
  const AddL2NormArgs args{static_cast<DType>(dtype),
                           rows,
                           width,
                           residual,
                           residual_stride,
                           update,
                           update_stride,
                           out,
                           out_stride,
                           norms,
                           norms_stride,
                           updates,
                           updates_stride,
                           modes != nullptr ? *modes : AddModes{}};
  return guarded([&] { return kernels::launch_add_l2norm(args, Launcher{}); });
}

int void_shim_add_rms_norm(int dtype, int64_t rows, int64_t width, const void* residual, int64_t residual_stride,
                           const void* update, int64_t update_stride, void* out, int64_t out_stride, float* norms,
                           int64_t norms_stride, float* updates, int64_t updates_stride, const AddModes* modes,
                           const void* weight, int weight_dtype, int zero_centered, float eps, void* normed,
                           int64_t normed_stride) {
  const AddL2NormArgs add{static_cast<DType>(dtype),
                          rows,
                          width,
                          residual,
                          residual_stride,
                          update,
                          update_stride,
                          out,
                          out_stride,
                          norms,
                          norms_stride,
                          updates,
                          updates_stride,
                          modes != nullptr ? *modes : AddModes{}};
  const AddRmsNormArgs args{add,    weight,       static_cast<DType>(weight_dtype), zero_centered != 0, eps,
                            normed, normed_stride};
  return guarded([&] { return kernels::launch_add_rms_norm(args, Launcher{}); });
}

int void_shim_row_l2norm(int dtype, int64_t rows, int64_t width, const void* stream, int64_t stream_stride,
                         float* norms, int64_t norms_stride) {
  const RowL2NormArgs args{static_cast<DType>(dtype), rows, width, stream, stream_stride, norms, norms_stride};
  return guarded([&] { return kernels::launch_row_l2norm(args, Launcher{}); });
}

int void_shim_streams_l2norm(int dtype, int64_t rows, int64_t width, int64_t count, const void* const* streams,
                             const int64_t* strides, float* norms, int64_t norms_stride, int64_t column_stride) {
  StreamsL2NormArgs args{};
  args.dtype = static_cast<DType>(dtype);
  args.rows = rows;
  args.width = width;
  args.count = count;
  for (int64_t i = 0; i < count && i < kMostStreams; ++i) {
    args.stream[i] = streams[i];
    args.stream_stride[i] = strides[i];
  }
  args.norms = norms;
  args.norms_stride = norms_stride;
  args.column_stride = column_stride;
  return guarded([&] { return kernels::launch_streams_l2norm(args, Launcher{}); });
}

int void_shim_void_mask(int64_t rows, int64_t layers, const float* norms, int64_t norms_stride, const bool* executed,
                        int64_t executed_stride, float alpha, bool* active, int64_t active_stride) {
  const VoidMaskArgs args{rows, layers, norms, norms_stride, executed, executed_stride, alpha, active, active_stride};
  return guarded([&] { return kernels::launch_void_mask(args, Launcher{}); });
}

int void_shim_exit_select(int dtype, int64_t rows, int64_t width, void* kept, int64_t kept_stride, const void* stream,
                          int64_t stream_stride, const float* norms, int64_t norms_stride, int64_t layer, float alpha) {
  const ExitSelectArgs args{static_cast<DType>(dtype),
                            rows,
                            width,
                            kept,
                            kept_stride,
                            stream,
                            stream_stride,
                            norms,
                            norms_stride,
                            layer,
                            alpha};
  return guarded([&] { return kernels::launch_exit_select(args, Launcher{}); });
}

int void_shim_keep_rows(int dtype, int64_t rows, int64_t width, const void* residual, int64_t residual_stride,
                        const void* update, int64_t update_stride, const bool* on, int64_t on_stride, void* out,
                        int64_t out_stride) {
  const KeepRowsArgs args{static_cast<DType>(dtype),
                          rows,
                          width,
                          residual,
                          residual_stride,
                          update,
                          update_stride,
                          on,
                          on_stride,
                          out,
                          out_stride};
  return guarded([&] { return kernels::launch_keep_rows(args, Launcher{}); });
}

int void_shim_compact(int64_t rows, const bool* on, int64_t on_stride, int64_t* index, int64_t* inverse,
                      int64_t* count) {
  const CompactArgs args{rows, on, on_stride, index, inverse, count};
  return guarded([&] { return kernels::launch_compact(args, Launcher{}); });
}

int void_shim_gather_rows(int dtype, int64_t rows, int64_t width, const void* stream, int64_t stream_stride,
                          const int64_t* index, int64_t index_stride, const int64_t* count, int64_t capacity, void* out,
                          int64_t out_stride) {
  const GatherRowsArgs args{static_cast<DType>(dtype),
                            rows,
                            width,
                            stream,
                            stream_stride,
                            index,
                            index_stride,
                            count,
                            capacity,
                            out,
                            out_stride};
  return guarded([&] { return kernels::launch_gather_rows(args, Launcher{}); });
}

int void_shim_scatter_rows(int dtype, int64_t rows, int64_t width, void* stream, int64_t stream_stride,
                           const void* source, int64_t source_stride, const int64_t* index, int64_t index_stride,
                           const int64_t* count, int64_t capacity) {
  const ScatterRowsArgs args{static_cast<DType>(dtype),
                             rows,
                             width,
                             stream,
                             stream_stride,
                             source,
                             source_stride,
                             index,
                             index_stride,
                             count,
                             capacity};
  return guarded([&] { return kernels::launch_scatter_rows(args, Launcher{}); });
}

// The rule as the host compiles it, for one history.
void void_shim_rule(int64_t layers, const float* norms, const bool* executed, float alpha, bool* active) {
  LacRule rule;
  for (int64_t l = 0; l < layers; ++l) {
    const float delta = norms[l + 1] - norms[l];
    active[l] = executed[l] && rule.active(delta, alpha);
    if (executed[l]) rule.admit(delta);
  }
}

int void_shim_faulty(int fault, float* out) {
  return guarded([&] { return Launcher{}(faulty_kernel, dim3(1), dim3(64), Faulty{fault, out}); });
}

}  // extern "C"
