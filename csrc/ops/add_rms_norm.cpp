// add_l2norm and the RMSNorm that follows it, whose sum of squares is the norm's.
#include <cmath>
#include <tuple>

#include "add_inputs.h"
#include "device.h"

namespace void_ext {

namespace {

constexpr const char* kOp = "add_rms_norm";

// What the norm adds to the arguments of the add.
struct Scale {
  Scale(const AddInputs& inputs, const Tensor& tensor, double epsilon, bool centered)
      : weight(kOp, "weight", tensor), eps(epsilon), zero_centered(centered) {
    const View& rows = inputs.residual();
    if (weight.dtype != rows.dtype && weight.dtype != aoti_torch_dtype_float32()) {
      const bool narrow = rows.dtype != aoti_torch_dtype_float32();
      fail(kOp, "weight", "expected ", rows.dtype_name(), " like residual", narrow ? ", or float32" : "", ", got ",
           weight.dtype_name());
    }
    check_same_device(weight, rows);
    if (weight.dim != 1 || weight.sizes[0] != inputs.rows().width) {
      fail(kOp, "weight", "expected shape [", inputs.rows().width, "], the width of residual, got ", weight.shape());
    }
    if (weight.sizes[0] > 1 && weight.strides[0] != 1) {
      fail(kOp, "weight", "expected a contiguous tensor, got stride ", weight.strides[0]);
    }
    inputs.check_apart_from_tables(weight);
    if (!(std::isfinite(eps) && eps >= 0)) fail(kOp, "eps", "expected a finite number >= 0, got ", eps);
  }

  AddRmsNormArgs arguments(const AddL2NormArgs& add, const Tensor& normed, int64_t normed_stride) const {
    AddRmsNormArgs args{};
    args.add = add;
    args.weight = weight.tensor.data_ptr();
    args.weight_dtype = weight.dtype == aoti_torch_dtype_float32() ? DType::kFloat32 : add.dtype;
    args.zero_centered = zero_centered;
    args.eps = static_cast<float>(eps);
    args.normed = normed.data_ptr();
    args.normed_stride = normed_stride;
    return args;
  }

  View weight;
  double eps;
  bool zero_centered;
};

template <typename Device>
std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& residual, const Tensor& update, const Tensor& weight, double eps,
                                        const std::optional<Tensor>& norms, int64_t column,
                                        const std::optional<Tensor>& updates, bool zero_centered) {
  AddInputs inputs(kOp, residual, update, norms ? &*norms : nullptr, column, updates);
  const Scale scale(inputs, weight, eps, zero_centered);
  Device::require(inputs.residual());
  Tensor out = Device::new_like(inputs.residual());
  Tensor normed = Device::new_like(inputs.residual());
  const int64_t stride = inputs.rows().width;
  Device::run(inputs.residual(), scale.arguments(inputs.arguments(out, stride), normed, stride));
  return {out, normed};
}

template <typename Device>
void add_rms_norm_into(const Tensor& residual, const Tensor& update, const Tensor& weight, double eps,
                       const std::optional<Tensor>& norms, int64_t column, const std::optional<Tensor>& updates,
                       bool zero_centered, const std::optional<Tensor>& on, double alpha,
                       const std::optional<Tensor>& executed, const std::optional<Tensor>& active,
                       const std::optional<Tensor>& kept, const Tensor& out, const Tensor& normed) {
  AddInputs inputs(kOp, residual, update, norms ? &*norms : nullptr, column, updates);
  const Scale scale(inputs, weight, eps, zero_centered);
  inputs.choose({on, alpha, executed, active, kept});
  const View target(kOp, "out", out), second(kOp, "normed", normed);
  const int64_t out_stride = inputs.check_target(target, true);
  const int64_t normed_stride = inputs.check_target(second, false);
  check_apart(target, second, false);
  check_disjoint(scale.weight, target);
  check_disjoint(scale.weight, second);
  Device::require(inputs.residual());
  Device::run(inputs.residual(), scale.arguments(inputs.arguments(out, out_stride), normed, normed_stride));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(void_ext, m) {
  m.def(
      "add_rms_norm(Tensor residual, Tensor update, Tensor weight, float eps, Tensor(a!)? norms, int column=0, "
      "Tensor(b!)? updates=None, bool zero_centered=False) -> (Tensor, Tensor)");
  m.def(
      "add_rms_norm.into(Tensor residual, Tensor update, Tensor weight, float eps, Tensor(a!)? norms, int column, "
      "Tensor(b!)? updates, bool zero_centered, Tensor? on, float alpha, Tensor? executed, Tensor(c!)? active, "
      "Tensor(d!)? kept, Tensor(e!) out, Tensor(f!) normed) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(void_ext, CPU, m) {
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm<Cpu>));
  m.impl("add_rms_norm.into", TORCH_BOX(&add_rms_norm_into<Cpu>));
}
STABLE_TORCH_LIBRARY_IMPL(void_ext, CUDA, m) {
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm<Cuda>));
  m.impl("add_rms_norm.into", TORCH_BOX(&add_rms_norm_into<Cuda>));
}

}  // namespace void_ext
