#include "row_norms.h"

#include <utility>

#include "../cpu/row_kernels.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace void_ext::host {

namespace {

bool dtype_of(const TensorView& view, DType* out) {
  if (view.is(dlpack::kFloat, 32)) return *out = DType::kFloat32, true;
  if (view.is(dlpack::kFloat, 16)) return *out = DType::kFloat16, true;
  if (view.is(dlpack::kBFloat, 16)) return *out = DType::kBFloat16, true;
  return false;
}

}  // namespace

RowNorms::RowNorms(py::object table) : table_(std::move(table)) {
  TensorView view;
  if (!view.look_at(table_) || view.ndim != 2 || !view.is(dlpack::kFloat, 32)) {
    throw py::value_error("table: expected a contiguous float32 tensor [rows, columns] on the CPU");
  }
  norms_ = reinterpret_cast<float*>(view.memory());
  rows_ = view.shape[0];
  columns_ = view.shape[1];
}

bool RowNorms::write(py::handle stream, int64_t column) const {
  TensorView view;
  RowL2NormArgs args{};
  if (!view.look_at(stream) || view.ndim < 1 || !dtype_of(view, &args.dtype) || column < 0 || column >= columns_) {
    return false;
  }
  args.width = view.shape[view.ndim - 1];
  args.rows = args.width == 0 ? rows_ : view.count() / args.width;
  if (args.rows != rows_ || args.rows * args.width > cpu::kOneThread) return false;
  args.stream = view.memory();
  args.stream_stride = args.width;
  args.norms = norms_ + column;
  args.norms_stride = columns_;
  cpu::row_kernels().row_l2norm(args, 0, args.rows);
  return true;
}

int64_t RowNorms::write_all(const py::list& streams) const {
  int64_t column = 0;
  for (py::handle stream : streams) {
    if (!write(stream, column)) break;
    ++column;
  }
  return column;
}

}  // namespace void_ext::host
