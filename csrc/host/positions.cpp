#include "positions.h"

#include <algorithm>
#include <cstring>

#include "tensor_view.h"

namespace py = pybind11;

namespace void_ext::host {

bool put_positions(py::handle table, int64_t start, int64_t end, py::handle value) {
  TensorView into;
  if (!into.look_at(table) || into.ndim < 2 || start < 0 || start > end || end > into.shape[1]) return false;
  const int64_t batch = into.shape[0], capacity = into.shape[1], length = end - start, each = into.sizes(2);
  const int64_t size = into.dtype.bits / 8 * into.dtype.lanes;
  char* first = into.memory() + start * each * size;

  TensorView from;
  if (from.look_at(value)) {
    if (std::memcmp(&from.dtype, &into.dtype, sizeof from.dtype) != 0) return false;
    const bool whole = from.ndim == into.ndim && from.shape[0] == batch && from.shape[1] == length;
    const bool one = from.ndim == into.ndim - 2;
    if (!whole && !one) return false;
    const int32_t lead = whole ? 2 : 0;
    for (int32_t i = 2; i < into.ndim; ++i) {
      if (from.shape[i - 2 + lead] != into.shape[i]) return false;
    }
    for (int64_t row = 0; row < batch; ++row) {
      char* target = first + row * capacity * each * size;
      if (whole) {
        std::memcpy(target, from.memory() + row * length * each * size, length * each * size);
      } else {
        for (int64_t i = 0; i < length; ++i) std::memcpy(target + i * each * size, from.memory(), each * size);
      }
    }
    return true;
  }

  if (!PyLong_Check(value.ptr())) return false;  // True and False are such too
  const long long number = PyLong_AsLongLong(value.ptr());
  if (number == -1 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    return false;
  }
  const bool flags = into.is(dlpack::kBool, 8), whole_numbers = into.is(dlpack::kInt, 64);
  if (!flags && !whole_numbers) return false;
  for (int64_t row = 0; row < batch; ++row) {
    char* target = first + row * capacity * each * size;
    if (flags) {
      std::fill_n(reinterpret_cast<bool*>(target), length * each, number != 0);
    } else {
      std::fill_n(reinterpret_cast<int64_t*>(target), length * each, static_cast<int64_t>(number));
    }
  }
  return true;
}

}  // namespace void_ext::host
