#include "add_inputs.h"

namespace void_ext {

AddInputs::AddInputs(const char* op, const Tensor& residual, const Tensor& update, const Tensor* norms, int64_t column,
                     const std::optional<Tensor>& updates)
    : op_(op), residual_(op, "residual", residual), update_(op, "update", update), column_(column) {
  dtype_ = check_stream(residual_);
  check_same_shape(update_, residual_);
  rows_ = row_shape(residual_);
  if (norms != nullptr) {
    norms_.emplace(op, "norms", *norms);
    norms_stride_ = check_written_table(*norms_, residual_, rows_.count);
    check_column(op, column, 0, norms_->sizes[1] - 1, "a column of norms");
  }
  if (updates) {
    updates_.emplace(op, "updates", *updates);
    updates_stride_ = check_written_table(*updates_, residual_, rows_.count);
    check_column(op, column, 1, updates_->sizes[1], "as the update norm goes to column - 1 of updates");
    if (norms_) check_disjoint(*norms_, *updates_);
  }
  check_apart_from_tables(residual_);
  check_apart_from_tables(update_);
}

void AddInputs::check_apart_from_tables(const View& read) const {
  if (norms_) check_disjoint(read, *norms_);
  if (updates_) check_disjoint(read, *updates_);
}

void AddInputs::choose(const Choice& choice) {
  std::optional<View> on, active;
  if (choice.on) {
    on.emplace(op_, "on", *choice.on);
    modes_.on_stride = check_flags(*on, residual_, rows_.count);
    modes_.on = static_cast<const bool*>(choice.on->data_ptr());
  }
  if (choice.active) {
    active.emplace(op_, "active", *choice.active);
    modes_.active_stride = check_flags(*active, residual_, rows_.count);
    check_written_flags(*active);
    if (on && !(on->tensor.data_ptr() == active->tensor.data_ptr() && modes_.on_stride == modes_.active_stride)) {
      check_disjoint(*on, *active);  // the same flags are read before they are written
    }
    modes_.active = static_cast<bool*>(choice.active->data_ptr());
  }
  if (choice.kept) {
    kept_.emplace(op_, "kept", *choice.kept);
    modes_.kept_stride = check_target(*kept_, false);
    modes_.kept = choice.kept->data_ptr();
  }
  const bool judged = choice.active || choice.kept;  // not by their pointers: without rows these are null
  if (judged) {
    if (!norms_) fail(op_, "norms", "expected the table that a verdict is read from beside active or kept, got None");
    check_column(op_, column_, 1, norms_->sizes[1] - 1, "as a verdict on a layer needs the norm before it too");
    check_neighbouring_columns(*norms_, " beside active or kept");
    check_alpha(op_, choice.alpha);
    modes_.layer = column_ - 1;
    modes_.alpha = static_cast<float>(choice.alpha);
  }
  if (choice.executed) {
    const View ran(op_, "executed", *choice.executed);
    if (!judged) fail(op_, "executed", "expected active or kept beside it, which a verdict is for");
    if (ran.dtype != aoti_torch_dtype_bool()) fail(op_, "executed", "expected bool, got ", ran.dtype_name());
    if (ran.dim != 2 || ran.sizes[0] < rows_.count || ran.sizes[1] < modes_.layer) {
      fail(op_, "executed", "expected at least ", rows_.count, " rows of the ", modes_.layer,
           " layers before, got shape ", ran.shape());
    }
    check_same_device(ran, residual_);
    if (ran.sizes[1] > 1 && ran.strides[1] != 1) {
      fail(op_, "executed", "expected neighbouring columns (stride 1), got stride ", ran.strides[1]);
    }
    if (active) check_disjoint(ran, *active);
    modes_.executed = static_cast<const bool*>(choice.executed->data_ptr());
    modes_.executed_stride = ran.strides[0];
  }
}

int64_t AddInputs::check_target(const View& target, bool same) const {
  check_same_shape(target, residual_);
  const int64_t stride = check_mutable_rows(target);
  check_apart(residual_, target, same);
  check_apart(update_, target, same);
  if (kept_ && &target != &*kept_) check_apart(*kept_, target, false);
  if (norms_) check_disjoint(*norms_, target);
  if (updates_) check_disjoint(*updates_, target);
  return stride;
}

AddL2NormArgs AddInputs::arguments(const Tensor& out, int64_t out_stride) {
  AddL2NormArgs args{};
  args.dtype = dtype_;
  args.rows = rows_.count;
  args.width = rows_.width;
  residual_rows_ = with_rows(residual_, &args.residual_stride);
  args.residual = residual_rows_->data_ptr();
  update_rows_ = with_rows(update_, &args.update_stride);
  args.update = update_rows_->data_ptr();
  args.out = out.data_ptr();
  args.out_stride = out_stride;
  if (norms_) {
    args.norms = column_of(*norms_, column_);
    args.norms_stride = norms_stride_;
  }
  if (updates_) {
    args.updates = column_of(*updates_, column_ - 1);
    args.updates_stride = updates_stride_;
  }
  args.modes = modes_;
  return args;
}

}  // namespace void_ext
