// h = residual + update, ||h|| into a column of norms, ||h - residual|| into one of updates; into tensors of the
// caller's, for chosen rows and with a verdict on the layer, by the overload `into`.
#include "add_inputs.h"
#include "device.h"

namespace void_ext {

namespace {

template <typename Device>
Tensor add_l2norm(const Tensor& residual, const Tensor& update, const Tensor& norms, int64_t column,
                  const std::optional<Tensor>& updates) {
  AddInputs inputs("add_l2norm", residual, update, &norms, column, updates);
  Device::require(inputs.residual());
  Tensor out = Device::new_like(inputs.residual());
  Device::run(inputs.residual(), inputs.arguments(out, inputs.rows().width));
  return out;
}

template <typename Device>
void add_l2norm_into(const Tensor& residual, const Tensor& update, const Tensor& norms, int64_t column,
                     const std::optional<Tensor>& updates, const std::optional<Tensor>& on, double alpha,
                     const std::optional<Tensor>& executed, const std::optional<Tensor>& active,
                     const std::optional<Tensor>& kept, const Tensor& out) {
  AddInputs inputs("add_l2norm", residual, update, &norms, column, updates);
  inputs.choose({on, alpha, executed, active, kept});
  const int64_t out_stride = inputs.check_target(View("add_l2norm", "out", out), true);
  Device::require(inputs.residual());
  Device::run(inputs.residual(), inputs.arguments(out, out_stride));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(void_ext, m) {
  m.def("add_l2norm(Tensor residual, Tensor update, Tensor(a!) norms, int column, Tensor(b!)? updates=None) -> Tensor");
  m.def(
      "add_l2norm.into(Tensor residual, Tensor update, Tensor(a!) norms, int column, Tensor(b!)? updates, Tensor? on, "
      "float alpha, Tensor? executed, Tensor(c!)? active, Tensor(d!)? kept, Tensor(e!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(void_ext, CPU, m) {
  m.impl("add_l2norm", TORCH_BOX(&add_l2norm<Cpu>));
  m.impl("add_l2norm.into", TORCH_BOX(&add_l2norm_into<Cpu>));
}
STABLE_TORCH_LIBRARY_IMPL(void_ext, CUDA, m) {
  m.impl("add_l2norm", TORCH_BOX(&add_l2norm<Cuda>));
  m.impl("add_l2norm.into", TORCH_BOX(&add_l2norm_into<Cuda>));
}

}  // namespace void_ext
