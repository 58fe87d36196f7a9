// Values of a call's positions into a table of a trace, at the cost of a Python call: a slice and a copy_ take 4 us.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace void_ext::host {

// table[:, start:end] = value.
//
// table: [B, capacity, ...]. value: a tensor of the same dtype, [B, end - start, ...], or one position's [...], for all
// alike; or a number, for tables of int64 and bool. False, and nothing done, where torch has to: tensors that are not
// contiguous, not on the CPU, of other types or shapes, positions that are not there.
bool put_positions(pybind11::handle table, int64_t start, int64_t end, pybind11::handle value);

}  // namespace void_ext::host
