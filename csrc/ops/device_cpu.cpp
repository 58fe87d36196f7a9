#include <torch/csrc/stable/ops.h>

#include "../cpu/exit_select.h"
#include "../cpu/huge_pages.h"
#include "../cpu/isa.h"
#include "../cpu/row_kernels.h"
#include "../cpu/void_mask.h"
#include "device.h"

namespace void_ext {

namespace {

const cpu::RowKernels& row_kernels() {
  static const cpu::RowKernels& chosen = [&]() -> const cpu::RowKernels& {
#ifdef VOID_EXT_X86
    if (cpu::selected_isa() == "avx512") return cpu::kAvx512;
    if (cpu::selected_isa() == "avx2") return cpu::kAvx2;
#endif
    return cpu::kBaseline;
  }();
  return chosen;
}

// kernel(args, begin, end) over all rows, each of `width` elements of work.
template <typename Args>
void spread(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t rows, int64_t width) {
  // torch's own measure of what is worth a thread: a decode step's few rows stay on the caller's.
  constexpr int64_t kElements = 32768;
  const int64_t grain = kElements / (width < 1 ? 1 : width > kElements ? kElements : width);
  if (rows <= grain) {
    kernel(args, 0, rows);
  } else {
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
}

}  // namespace

Tensor Cpu::new_like(const View& like) {
  Tensor out = void_ext::new_like(like);
  cpu::expect_huge_pages(out.data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  return out;
}

void Cpu::run(const View&, const AddL2NormArgs& args) { spread(row_kernels().add_l2norm, args, args.rows, args.width); }
void Cpu::run(const View&, const AddRmsNormArgs& args) {
  spread(row_kernels().add_rms_norm, args, args.add.rows, args.add.width);
}
void Cpu::run(const View&, const RowL2NormArgs& args) { spread(row_kernels().row_l2norm, args, args.rows, args.width); }
void Cpu::run(const View&, const VoidMaskArgs& args) { spread(cpu::void_mask, args, args.rows, args.layers); }
void Cpu::run(const View&, const ExitSelectArgs& args) { spread(cpu::exit_select, args, args.rows, args.width); }

}  // namespace void_ext
