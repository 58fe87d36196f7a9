// h = residual + update in the rows that are on, residual in the others.
#include "device.h"

namespace void_ext {

namespace {

template <typename Device>
Tensor keep_rows(const Tensor& residual, const Tensor& update, const Tensor& on) {
  const char* op = "keep_rows";
  const View stream(op, "residual", residual);
  const View added(op, "update", update);
  const View flags(op, "on", on);
  KeepRowsArgs args{};
  args.dtype = check_stream(stream);
  check_same_shape(added, stream);
  const Rows rows = row_shape(stream);
  args.on_stride = check_flags(flags, stream, rows.count);
  Device::require(stream);

  Tensor out = Device::new_like(stream);
  args.rows = rows.count;
  args.width = rows.width;
  const Tensor held = with_rows(stream, &args.residual_stride);
  args.residual = held.data_ptr();
  const Tensor held_update = with_rows(added, &args.update_stride);
  args.update = held_update.data_ptr();
  args.on = static_cast<const bool*>(on.data_ptr());
  args.out = out.data_ptr();
  args.out_stride = rows.width;
  Device::run(stream, args);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(void_ext, m) { m.def("keep_rows(Tensor residual, Tensor update, Tensor on) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(void_ext, CPU, m) { m.impl("keep_rows", TORCH_BOX(&keep_rows<Cpu>)); }
STABLE_TORCH_LIBRARY_IMPL(void_ext, CUDA, m) { m.impl("keep_rows", TORCH_BOX(&keep_rows<Cuda>)); }

}  // namespace void_ext
