#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../cpu/compact.h"
#include "../cpu/exit_select.h"
#include "../cpu/gather_rows.h"
#include "../cpu/huge_pages.h"
#include "../cpu/row_kernels.h"
#include "../cpu/scatter_rows.h"
#include "../cpu/streams_l2norm.h"
#include "../cpu/void_mask.h"
#include "device.h"

namespace void_ext {

namespace {

// kernel(args, begin, end) over all rows, each of `width` elements of work.
template <typename Args>
void spread(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t rows, int64_t width) {
  const int64_t grain = cpu::kOneThread / (width < 1 ? 1 : width > cpu::kOneThread ? cpu::kOneThread : width);
  if (rows <= grain) {
    kernel(args, 0, rows);
  } else {
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
}

}  // namespace

void Cpu::check_indices(const View& index, const View& count, int64_t capacity, int64_t rows) {
  const int64_t found = *static_cast<const int64_t*>(count.tensor.data_ptr());
  if (found < 0) fail(count.op, count.name, "expected a number of rows >= 0, got ", found);
  const int64_t* entries = static_cast<const int64_t*>(index.tensor.data_ptr());
  for (int64_t i = 0; i < std::min(found, capacity); ++i) {
    const int64_t row = entries[i * index.strides[0]];
    if (row < 0 || row >= rows) {
      fail(index.op, index.name, "expected rows 0 to ", rows - 1, " of stream below the count, got ", row, " at ", i);
    }
  }
}

Tensor Cpu::new_like(const View& like) {
  Tensor out = void_ext::new_like(like);
  cpu::expect_huge_pages(out.data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  return out;
}

void Cpu::run(const View&, const AddL2NormArgs& args) {
  spread(cpu::row_kernels().add_l2norm, args, args.rows, args.width);
}
void Cpu::run(const View&, const AddRmsNormArgs& args) {
  spread(cpu::row_kernels().add_rms_norm, args, args.add.rows, args.add.width);
}
void Cpu::run(const View&, const RowL2NormArgs& args) {
  spread(cpu::row_kernels().row_l2norm, args, args.rows, args.width);
}
void Cpu::run(const View&, const StreamsL2NormArgs& args) {
  spread(cpu::streams_l2norm, args, args.count * args.rows, args.width);
}
void Cpu::run(const View&, const VoidMaskArgs& args) { spread(cpu::void_mask, args, args.rows, args.layers); }
void Cpu::run(const View&, const ExitSelectArgs& args) { spread(cpu::exit_select, args, args.rows, args.width); }
void Cpu::run(const View&, const KeepRowsArgs& args) {
  spread(cpu::row_kernels().keep_rows, args, args.rows, args.width);
}
void Cpu::run(const View&, const CompactArgs& args) { cpu::compact(args); }
void Cpu::run(const View&, const GatherRowsArgs& args) {
  spread(cpu::gather_rows, args, std::min(*args.count, args.capacity), args.width);
}
void Cpu::run(const View&, const ScatterRowsArgs& args) {
  spread(cpu::scatter_rows, args, std::min(*args.count, args.capacity), args.width);
}

}  // namespace void_ext
