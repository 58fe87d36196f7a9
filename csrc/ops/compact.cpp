// Which rows are on: their index, every row's place among them, their count.
#include <tuple>

#include "device.h"

namespace void_ext {

namespace {

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> compact(const Tensor& on) {
  const View flags("compact", "on", on);
  check_vector(flags, aoti_torch_dtype_bool());
  Device::require(flags);

  CompactArgs args{};
  args.rows = flags.sizes[0];
  args.on = static_cast<const bool*>(on.data_ptr());
  args.on_stride = flags.strides[0];
  Tensor index = new_int64(flags, args.rows);
  Tensor inverse = new_int64(flags, args.rows);
  Tensor count = new_int64(flags, 1);
  args.index = static_cast<int64_t*>(index.data_ptr());
  args.inverse = static_cast<int64_t*>(inverse.data_ptr());
  args.count = static_cast<int64_t*>(count.data_ptr());
  Device::run(flags, args);
  return {index, inverse, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(void_ext, m) {
  m.def("compact(Tensor on) -> (Tensor index, Tensor inverse, Tensor count)");
}
STABLE_TORCH_LIBRARY_IMPL(void_ext, CPU, m) { m.impl("compact", TORCH_BOX(&compact<Cpu>)); }
STABLE_TORCH_LIBRARY_IMPL(void_ext, CUDA, m) { m.impl("compact", TORCH_BOX(&compact<Cuda>)); }

}  // namespace void_ext
