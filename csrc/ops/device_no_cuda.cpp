// Compiled in a build without CUDA: a CUDA tensor meets an error that says what to do, not the dispatcher's.
#include "build_info.h"
#include "device.h"

namespace void_ext {

namespace {

[[noreturn]] void refuse(const View& view) {
  fail(view.op, view.name, "is on ", view.device(),
       ", but void_ext was built without CUDA (" VOID_EXT_CUDA_REASON
       "). Where nvcc is installed, rebuild it from its source directory: "
       "VOID_EXT_CUDA=1 pip install --no-build-isolation --no-deps --force-reinstall .");
}

}  // namespace

void Cuda::require(const View& view) { refuse(view); }
void Cuda::run(const View& view, const AddL2NormArgs&) { refuse(view); }
void Cuda::run(const View& view, const AddRmsNormArgs&) { refuse(view); }
void Cuda::run(const View& view, const RowL2NormArgs&) { refuse(view); }
void Cuda::run(const View& view, const StreamsL2NormArgs&) { refuse(view); }
void Cuda::run(const View& view, const VoidMaskArgs&) { refuse(view); }
void Cuda::run(const View& view, const ExitSelectArgs&) { refuse(view); }
void Cuda::run(const View& view, const KeepRowsArgs&) { refuse(view); }
void Cuda::run(const View& view, const CompactArgs&) { refuse(view); }
void Cuda::run(const View& view, const GatherRowsArgs&) { refuse(view); }
void Cuda::run(const View& view, const ScatterRowsArgs&) { refuse(view); }

}  // namespace void_ext
