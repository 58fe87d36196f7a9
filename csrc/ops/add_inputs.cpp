#include "add_inputs.h"

namespace void_ext {

AddInputs::AddInputs(const char* op, const Tensor& residual, const Tensor& update, const Tensor& norms, int64_t column,
                     const std::optional<Tensor>& updates)
    : residual_(op, "residual", residual), update_(op, "update", update), norms_(op, "norms", norms), column_(column) {
  dtype_ = check_stream(residual_);
  check_same_shape(update_, residual_);
  rows_ = row_shape(residual_);
  norms_stride_ = check_table(norms_, residual_, rows_.count);
  check_column(op, column, 0, norms_.sizes[1] - 1, "a column of norms");
  if (updates) {
    updates_.emplace(op, "updates", *updates);
    updates_stride_ = check_table(*updates_, residual_, rows_.count);
    check_column(op, column, 1, updates_->sizes[1], "as the update norm goes to column - 1 of updates");
  }
}

AddL2NormArgs AddInputs::arguments(const Tensor& out) {
  AddL2NormArgs args{};
  args.dtype = dtype_;
  args.rows = rows_.count;
  args.width = rows_.width;
  residual_rows_ = with_rows(residual_, &args.residual_stride);
  args.residual = residual_rows_->data_ptr();
  update_rows_ = with_rows(update_, &args.update_stride);
  args.update = update_rows_->data_ptr();
  args.out = out.data_ptr();
  args.out_stride = rows_.width;
  args.norms = column_of(norms_, column_);
  args.norms_stride = norms_stride_;
  if (updates_) {
    args.updates = column_of(*updates_, column_ - 1);
    args.updates_stride = updates_stride_;
  }
  return args;
}

}  // namespace void_ext
