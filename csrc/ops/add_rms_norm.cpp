// add_l2norm and the RMSNorm that follows it, whose sum of squares is the norm's.
#include <cmath>
#include <tuple>

#include "add_inputs.h"
#include "device.h"

namespace void_ext {

namespace {

template <typename Device>
std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& residual, const Tensor& update, const Tensor& weight, double eps,
                                        const Tensor& norms, int64_t column, const std::optional<Tensor>& updates) {
  const char* op = "add_rms_norm";
  AddInputs inputs(op, residual, update, norms, column, updates);
  const View scale(op, "weight", weight);
  check_same_kind(scale, inputs.residual());
  if (scale.dim != 1 || scale.sizes[0] != inputs.rows().width) {
    fail(op, "weight", "expected shape [", inputs.rows().width, "], the width of residual, got ", scale.shape());
  }
  if (scale.sizes[0] > 1 && scale.strides[0] != 1) {
    fail(op, "weight", "expected a contiguous tensor, got stride ", scale.strides[0]);
  }
  if (!(std::isfinite(eps) && eps >= 0)) fail(op, "eps", "expected a finite number >= 0, got ", eps);
  Device::require(inputs.residual());

  Tensor out = Device::new_like(inputs.residual());
  Tensor normed = Device::new_like(inputs.residual());
  AddRmsNormArgs args{};
  args.add = inputs.arguments(out);
  args.weight = weight.data_ptr();
  args.eps = static_cast<float>(eps);
  args.normed = normed.data_ptr();
  args.normed_stride = args.add.width;
  Device::run(inputs.residual(), args);
  return {out, normed};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(void_ext, m) {
  m.def(
      "add_rms_norm(Tensor residual, Tensor update, Tensor weight, float eps, Tensor(a!) norms, int column, "
      "Tensor(b!)? updates=None) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(void_ext, CPU, m) { m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm<Cpu>)); }
STABLE_TORCH_LIBRARY_IMPL(void_ext, CUDA, m) { m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm<Cuda>)); }

}  // namespace void_ext
