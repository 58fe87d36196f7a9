// ||stream|| of every row of several streams, a column of norms each: of streams that were kept, in one launch.
#include <algorithm>
#include <vector>

#include "device.h"

namespace void_ext {

namespace {

template <typename Device>
void streams_l2norm(const std::vector<Tensor>& streams, const Tensor& norms, int64_t column) {
  const char* op = "streams_l2norm";
  const int64_t count = static_cast<int64_t>(streams.size());
  if (count == 0) fail(op, "streams", "expected at least one tensor, got none");
  const View first(op, "streams[0]", streams[0]);
  const View table(op, "norms", norms);
  StreamsL2NormArgs args{};
  args.dtype = check_stream(first);
  const Rows rows = row_shape(first);
  const Span written = span_of(table);
  std::vector<View> views;
  views.reserve(streams.size());
  for (const Tensor& stream : streams) {
    const View& view = views.emplace_back(op, "streams", stream);
    if (!alike(view, first) || span_of(view).overlaps(written)) {
      const std::string name = "streams[" + std::to_string(views.size() - 1) + "]";
      const View named(op, name.c_str(), stream);
      check_same_shape(named, first);
      check_disjoint(named, table);
    }
  }
  args.norms_stride = check_written_table(table, first, rows.count);
  if (table.sizes[1] < count) {
    fail(op, "norms", "expected at least ", count, " columns, one for each stream, got shape ", table.shape());
  }
  check_column(op, column, 0, table.sizes[1] - count, "where the streams' columns begin");
  Device::require(first);

  args.rows = rows.count;
  args.width = rows.width;
  args.column_stride = table.strides[1];
  std::vector<Tensor> held;  // until the launch
  held.reserve(streams.size());
  for (int64_t begin = 0; begin < count; begin += kMostStreams) {
    args.count = std::min<int64_t>(kMostStreams, count - begin);
    for (int64_t i = 0; i < args.count; ++i) {
      held.push_back(with_rows(views[static_cast<size_t>(begin + i)], &args.stream_stride[i]));
      args.stream[i] = held.back().data_ptr();
    }
    args.norms = column_of(table, column + begin);
    Device::run(first, args);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(void_ext, m) {
  m.def("streams_l2norm(Tensor[] streams, Tensor(a!) norms, int column=0) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(void_ext, CPU, m) { m.impl("streams_l2norm", TORCH_BOX(&streams_l2norm<Cpu>)); }
STABLE_TORCH_LIBRARY_IMPL(void_ext, CUDA, m) { m.impl("streams_l2norm", TORCH_BOX(&streams_l2norm<Cuda>)); }

}  // namespace void_ext
