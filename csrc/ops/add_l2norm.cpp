// h = residual + update, ||h|| into a column of norms, ||h - residual|| into one of updates.
#include "add_inputs.h"
#include "device.h"

namespace void_ext {

namespace {

template <typename Device>
Tensor add_l2norm(const Tensor& residual, const Tensor& update, const Tensor& norms, int64_t column,
                  const std::optional<Tensor>& updates) {
  AddInputs inputs("add_l2norm", residual, update, norms, column, updates);
  Device::require(inputs.residual());
  Tensor out = Device::new_like(inputs.residual());
  Device::run(inputs.residual(), inputs.arguments(out));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(void_ext, m) {
  m.def("add_l2norm(Tensor residual, Tensor update, Tensor(a!) norms, int column, Tensor(b!)? updates=None) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(void_ext, CPU, m) { m.impl("add_l2norm", TORCH_BOX(&add_l2norm<Cpu>)); }
STABLE_TORCH_LIBRARY_IMPL(void_ext, CUDA, m) { m.impl("add_l2norm", TORCH_BOX(&add_l2norm<Cuda>)); }

}  // namespace void_ext
