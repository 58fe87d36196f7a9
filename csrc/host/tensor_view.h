// A look at a Python tensor's memory, without torch's headers: by the table of C functions that torch.Tensor publishes.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "dlpack.h"

namespace void_ext::host {

struct TensorView : dlpack::Tensor {
  // Looks at object, for as long as it lives. False where it is not of type torch.Tensor itself, not in plain memory of
  // the CPU, or its elements do not lie one behind the other.
  bool look_at(pybind11::handle object);

  char* memory() const { return static_cast<char*>(data) + byte_offset; }
  int64_t count() const { return sizes(0); }
  int64_t sizes(int32_t first) const;  // the product of the sizes from a dimension on

  bool is(uint8_t code, uint8_t bits) const { return dtype.code == code && dtype.bits == bits && dtype.lanes == 1; }
};

// Whether this torch shows its tensors in that way.
bool tensors_visible();

}  // namespace void_ext::host
