#include "tensor_view.h"

namespace py = pybind11;

namespace void_ext::host {

namespace {

// What torch.Tensor publishes; looked up once, under the GIL.
struct TensorType {
  PyTypeObject* type = nullptr;
  const dlpack::ExchangeApi* api = nullptr;

  TensorType() {
    py::object tensor = py::module_::import("torch").attr("Tensor");
    py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsule)) return;
    auto* found = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
    while (found != nullptr && found->version.major != dlpack::kMajor) found = found->previous;
    if (found == nullptr || found->view_of_object == nullptr) return;
    type = reinterpret_cast<PyTypeObject*>(tensor.release().ptr());
    api = found;
  }
};

const TensorType& tensor_type() {
  static const TensorType* found = new TensorType;  // never freed: Python may be gone before statics are
  return *found;
}

bool contiguous(const dlpack::Tensor& tensor) {
  if (tensor.strides == nullptr) return true;
  int64_t expected = 1;
  bool compact = true;
  for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] == 0) return true;
    compact = compact && (tensor.shape[i] == 1 || tensor.strides[i] == expected);
    expected *= tensor.shape[i];
  }
  return compact;
}

}  // namespace

bool TensorView::look_at(py::handle object) {
  const TensorType& known = tensor_type();
  if (known.api == nullptr || Py_TYPE(object.ptr()) != known.type) return false;
  if (known.api->view_of_object(object.ptr(), this) != 0) {
    PyErr_Clear();
    return false;
  }
  return device.type == dlpack::kCpu && contiguous(*this);
}

int64_t TensorView::sizes(int32_t first) const {
  int64_t product = 1;
  for (int32_t i = first; i < ndim; ++i) product *= shape[i];
  return product;
}

bool tensors_visible() { return tensor_type().api != nullptr; }

}  // namespace void_ext::host
