// What add_l2norm and add_rms_norm check alike, and the arguments both fill in.
#pragma once

#include <optional>

#include "checks.h"

namespace void_ext {

// The checks, made on construction; then arguments(), which may copy what has no row stride.
class AddInputs {
 public:
  AddInputs(const char* op, const Tensor& residual, const Tensor& update, const Tensor& norms, int64_t column,
            const std::optional<Tensor>& updates);

  const View& residual() const { return residual_; }
  const Rows& rows() const { return rows_; }

  // `out`: the contiguous tensor to write h to. The copies live as long as this object.
  AddL2NormArgs arguments(const Tensor& out);

 private:
  View residual_, update_, norms_;
  std::optional<View> updates_;
  DType dtype_;
  Rows rows_;
  int64_t column_;
  int64_t norms_stride_;
  int64_t updates_stride_ = 0;
  std::optional<Tensor> residual_rows_, update_rows_;
};

}  // namespace void_ext
