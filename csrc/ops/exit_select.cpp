// kept = stream in the rows whose layer `layer` was active: after all layers, the output of each row's last active one.
#include "device.h"

namespace void_ext {

namespace {

template <typename Device>
void exit_select(const Tensor& kept, const Tensor& stream, const Tensor& norms, int64_t layer, double alpha) {
  const char* op = "exit_select";
  const View target(op, "kept", kept);
  const View source(op, "stream", stream);
  const View table(op, "norms", norms);
  ExitSelectArgs args{};
  args.dtype = check_stream(target);
  check_same_shape(source, target);
  args.kept_stride = check_mutable_rows(target);
  check_apart(source, target, true);
  const Rows rows = row_shape(target);
  args.norms_stride = check_table(table, target, rows.count);
  if (layer < 0 || layer + 1 >= table.sizes[1]) {
    fail(op, "layer", "expected 0 to ", table.sizes[1] - 2,
         ", a layer with norms before and after it in norms of shape ", table.shape(), ", got ", layer);
  }
  check_alpha(op, alpha);
  Device::require(target);

  args.rows = rows.count;
  args.width = rows.width;
  const Tensor held = with_rows(source, &args.stream_stride);
  args.stream = held.data_ptr();
  args.kept = kept.data_ptr();
  args.norms = column_of(table, 0);
  args.layer = layer;
  args.alpha = static_cast<float>(alpha);
  Device::run(target, args);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(void_ext, m) {
  m.def("exit_select(Tensor(a!) kept, Tensor stream, Tensor norms, int layer, float alpha) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(void_ext, CPU, m) { m.impl("exit_select", TORCH_BOX(&exit_select<Cpu>)); }
STABLE_TORCH_LIBRARY_IMPL(void_ext, CUDA, m) { m.impl("exit_select", TORCH_BOX(&exit_select<Cuda>)); }

}  // namespace void_ext
