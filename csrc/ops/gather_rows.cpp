// The rows of a stream that an index names, one behind the other.
#include "device.h"

namespace void_ext {

namespace {

template <typename Device>
Tensor gather_rows(const Tensor& stream, const Tensor& index, const Tensor& count, int64_t capacity) {
  const char* op = "gather_rows";
  const View source(op, "stream", stream);
  const View entries(op, "index", index);
  const View number(op, "count", count);
  GatherRowsArgs args{};
  args.dtype = check_stream(source);
  const Rows rows = row_shape(source);
  if (capacity < 0 || capacity > rows.count) {
    fail(op, "capacity", "expected 0 to ", rows.count, ", the rows of stream, got ", capacity);
  }
  args.index_stride = check_index(entries, number, source, capacity, "the capacity");
  Device::require(source);
  Device::check_indices(entries, number, capacity, rows.count);

  Tensor out = new_rows(source, capacity, rows.width);
  args.rows = rows.count;
  args.width = rows.width;
  const Tensor held = with_rows(source, &args.stream_stride);
  args.stream = held.data_ptr();
  args.index = static_cast<const int64_t*>(index.data_ptr());
  args.count = static_cast<const int64_t*>(count.data_ptr());
  args.capacity = capacity;
  args.out = out.data_ptr();
  args.out_stride = rows.width;
  Device::run(source, args);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(void_ext, m) {
  m.def("gather_rows(Tensor stream, Tensor index, Tensor count, int capacity) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(void_ext, CPU, m) { m.impl("gather_rows", TORCH_BOX(&gather_rows<Cpu>)); }
STABLE_TORCH_LIBRARY_IMPL(void_ext, CUDA, m) { m.impl("gather_rows", TORCH_BOX(&gather_rows<Cuda>)); }

}  // namespace void_ext
