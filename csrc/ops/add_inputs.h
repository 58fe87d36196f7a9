// What add_l2norm and add_rms_norm check alike, and the arguments both fill in.
#pragma once

#include <optional>

#include "checks.h"

namespace void_ext {

// What an add does for chosen rows (AddModes), as the caller gave it.
struct Choice {
  const std::optional<Tensor>& on;
  double alpha;
  const std::optional<Tensor>& executed;
  const std::optional<Tensor>& active;
  const std::optional<Tensor>& kept;
};

// The checks, made on construction and by choose() and check_target(); then arguments(), which may copy what has no row
// stride. The tensors must outlive it.
class AddInputs {
 public:
  AddInputs(const char* op, const Tensor& residual, const Tensor& update, const Tensor* norms, int64_t column,
            const std::optional<Tensor>& updates);

  const View& residual() const { return residual_; }
  const Rows& rows() const { return rows_; }

  // What is read shares no memory with norms or updates, a column of which is written to.
  void check_apart_from_tables(const View& read) const;
  void choose(const Choice& choice);
  // A tensor of the caller's that rows like residual's are written to; returns its row stride. `same`: whether it may
  // be residual or update itself.
  int64_t check_target(const View& target, bool same) const;

  // `out`: where h goes. The copies live as long as this object.
  AddL2NormArgs arguments(const Tensor& out, int64_t out_stride);

 private:
  const char* op_;
  View residual_, update_;
  std::optional<View> norms_;
  std::optional<View> updates_;
  std::optional<View> kept_;
  DType dtype_;
  Rows rows_;
  int64_t column_;
  int64_t norms_stride_ = 0;
  int64_t updates_stride_ = 0;
  AddModes modes_{};
  std::optional<Tensor> residual_rows_, update_rows_;
};

}  // namespace void_ext
