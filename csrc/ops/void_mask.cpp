// Which layers were active, for any alpha, from the norms alone.
#include "device.h"

namespace void_ext {

namespace {

template <typename Device>
Tensor void_mask(const Tensor& norms, double alpha, const std::optional<Tensor>& executed) {
  const char* op = "void_mask";
  const View table(op, "norms", norms);
  VoidMaskArgs args{};
  args.norms_stride = check_table(table, table, 0);
  if (table.sizes[1] < 1) {
    fail(op, "norms", "expected at least one column, the norm before layer 0, got shape ", table.shape());
  }
  args.rows = table.sizes[0];
  args.layers = table.sizes[1] - 1;
  if (executed) {
    const View ran(op, "executed", *executed);
    if (ran.dtype != aoti_torch_dtype_bool()) fail(op, "executed", "expected bool, got ", ran.dtype_name());
    if (ran.dim != 2 || ran.sizes[0] != args.rows || ran.sizes[1] != args.layers) {
      fail(op, "executed", "expected shape [", args.rows, ", ", args.layers, "], a column less than norms, got ",
           ran.shape());
    }
    check_same_device(ran, table);
    if (args.layers > 1 && ran.strides[1] != 1) {
      fail(op, "executed", "expected neighbouring columns (stride 1), got stride ", ran.strides[1]);
    }
    args.executed_stride = ran.strides[0];
  }
  check_alpha(op, alpha);
  Device::require(table);

  Tensor active = new_bool(table, args.rows, args.layers);
  args.norms = column_of(table, 0);
  if (executed) args.executed = static_cast<const bool*>(executed->data_ptr());
  args.alpha = static_cast<float>(alpha);
  args.active = static_cast<bool*>(active.data_ptr());
  args.active_stride = args.layers;
  Device::run(table, args);
  return active;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(void_ext, m) {
  m.def("void_mask(Tensor norms, float alpha, Tensor? executed=None) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(void_ext, CPU, m) { m.impl("void_mask", TORCH_BOX(&void_mask<Cpu>)); }
STABLE_TORCH_LIBRARY_IMPL(void_ext, CUDA, m) { m.impl("void_mask", TORCH_BOX(&void_mask<Cuda>)); }

}  // namespace void_ext
