// ||stream|| of every row into a column of norms, for a stream that some other code has added up.
#include "device.h"

namespace void_ext {

namespace {

template <typename Device>
void row_l2norm(const Tensor& stream, const Tensor& norms, int64_t column) {
  const char* op = "row_l2norm";
  const View rows_of(op, "stream", stream);
  const View table(op, "norms", norms);
  RowL2NormArgs args{};
  args.dtype = check_stream(rows_of);
  const Rows rows = row_shape(rows_of);
  args.norms_stride = check_written_table(table, rows_of, rows.count);
  check_disjoint(rows_of, table);
  check_column(op, column, 0, table.sizes[1] - 1, "a column of norms");
  Device::require(rows_of);

  args.rows = rows.count;
  args.width = rows.width;
  const Tensor held = with_rows(rows_of, &args.stream_stride);
  args.stream = held.data_ptr();
  args.norms = column_of(table, column);
  Device::run(rows_of, args);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(void_ext, m) { m.def("row_l2norm(Tensor stream, Tensor(a!) norms, int column) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(void_ext, CPU, m) { m.impl("row_l2norm", TORCH_BOX(&row_l2norm<Cpu>)); }
STABLE_TORCH_LIBRARY_IMPL(void_ext, CUDA, m) { m.impl("row_l2norm", TORCH_BOX(&row_l2norm<Cuda>)); }

}  // namespace void_ext
