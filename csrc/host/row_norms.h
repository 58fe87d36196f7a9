// L2 norms of a stream's rows, written from Python without a dispatcher in between.
//
// A decode step on a CPU asks for one norm of a few hundred elements a layer: some 30 ns of arithmetic, behind 2.5 us
// of looking up an op, boxing its arguments and checking them. Here it is one call of a bound method.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace void_ext::host {

// Writes into the columns of one table. Holds the table.
class RowNorms {
 public:
  // table: torch.Tensor, float32 [rows, columns], contiguous, on the CPU; ValueError otherwise.
  explicit RowNorms(pybind11::object table);

  // norms[:, column] = ||stream||, as torch.ops.void_ext.row_l2norm gives it; bit for bit. False, and nothing done,
  // where the op has to: another type than torch.Tensor itself, another device, dtype, layout or number of rows, more
  // elements than one thread should have, a column that is not there.
  bool write(pybind11::handle stream, int64_t column) const;

  // The same of several streams, into columns 0, 1, ...; how many were written before one was for the op.
  int64_t write_all(const pybind11::list& streams) const;

 private:
  pybind11::object table_;
  float* norms_;
  int64_t rows_, columns_;
};

}  // namespace void_ext::host
