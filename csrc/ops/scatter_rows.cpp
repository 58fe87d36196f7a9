// Rows back to where an index says they came from; gather_rows the other way round.
#include "device.h"

namespace void_ext {

namespace {

template <typename Device>
void scatter_rows(const Tensor& stream, const Tensor& rows, const Tensor& index, const Tensor& count) {
  const char* op = "scatter_rows";
  const View target(op, "stream", stream);
  const View source(op, "rows", rows);
  const View entries(op, "index", index);
  const View number(op, "count", count);
  ScatterRowsArgs args{};
  args.dtype = check_stream(target);
  args.stream_stride = check_mutable_rows(target);
  const Rows shape = row_shape(target);
  check_same_kind(source, target);
  if (source.dim != 2 || source.sizes[0] > shape.count || source.sizes[1] != shape.width) {
    fail(op, "rows", "expected shape [n, ", shape.width, "] with n <= ", shape.count, ", the rows of stream, got ",
         source.shape());
  }
  args.index_stride = check_index(entries, number, target, source.sizes[0], "one for each of rows");
  check_apart(source, target, false);
  Device::require(target);
  Device::check_indices(entries, number, source.sizes[0], shape.count);

  args.rows = shape.count;
  args.width = shape.width;
  args.stream = stream.data_ptr();
  const Tensor held = with_rows(source, &args.source_stride);
  args.source = held.data_ptr();
  args.index = static_cast<const int64_t*>(index.data_ptr());
  args.count = static_cast<const int64_t*>(count.data_ptr());
  args.capacity = source.sizes[0];
  Device::run(target, args);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(void_ext, m) {
  m.def("scatter_rows(Tensor(a!) stream, Tensor rows, Tensor index, Tensor count) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(void_ext, CPU, m) { m.impl("scatter_rows", TORCH_BOX(&scatter_rows<Cpu>)); }
STABLE_TORCH_LIBRARY_IMPL(void_ext, CUDA, m) { m.impl("scatter_rows", TORCH_BOX(&scatter_rows<Cuda>)); }

}  // namespace void_ext
