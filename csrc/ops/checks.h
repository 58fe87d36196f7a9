// The checks every op makes before it allocates or launches, and the view of a tensor they make them on. A failed check
// throws std::invalid_argument (ValueError in Python): op, argument, what was expected, what came.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../args.h"

namespace void_ext {

using torch::stable::Tensor;

template <typename... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const char* op, const char* argument, const Parts&... parts) {
  std::ostringstream message;
  message << "void_ext::" << op << ": " << argument << ": ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

std::string dtype_name(int32_t code);

// What a check asks of a tensor, fetched once.
struct View {
  View(const char* op, const char* name, const Tensor& tensor);

  std::string shape() const;
  std::string device() const;
  std::string dtype_name() const { return void_ext::dtype_name(dtype); }

  const char* op;
  const char* name;
  const Tensor& tensor;
  int64_t dim;
  const int64_t* sizes;
  const int64_t* strides;
  int32_t dtype;
  int32_t device_type;
  int32_t device_index;
};

// A tensor [..., width] seen as rows with one stride.
struct Rows {
  int64_t count;
  int64_t width;
  int64_t stride;
};

// At least one dimension, a dtype the kernels know; returns it.
DType check_stream(const View& view);
void check_same_device(const View& view, const View& like);
void check_same_kind(const View& view, const View& like);   // dtype and device
void check_same_shape(const View& view, const View& like);  // and kind
bool alike(const View& view, const View& like);             // whether that check passes
void check_alpha(const char* op, double alpha);
// One dimension of that dtype.
void check_vector(const View& view, int32_t dtype);

// Size of the last dimension and product of the others.
Rows row_shape(const View& view);
// The row stride, or nothing where the leading dimensions do not fall into one or the elements of a row lie apart.
std::optional<int64_t> row_stride(const View& view);
// The same for an argument that is written to: no copy could stand in for it, and no two rows may share an element.
int64_t check_mutable_rows(const View& view);

// `view` is read while `written` is: their rows share no element, or are the very same ones where `same` is harmless.
// Both are of one dtype, and `written` has passed check_mutable_rows.
void check_apart(const View& view, const View& written, bool same);

// The memory of a tensor from its first element to behind its last; nothing where it has none.
struct Span {
  intptr_t begin, end;
  bool overlaps(const Span& other) const {
    return begin < other.end && other.begin < end && begin < end && other.begin < other.end;
  }
};
Span span_of(const View& view);
// The spans of both hold nothing of each other, or both are parts of one larger matrix that have no element in common.
void check_disjoint(const View& view, const View& written);
// No two rows share a flag that is written to.
void check_written_flags(const View& flags);

// Flags bool [rows], one for each row of `like`. Returns their stride.
int64_t check_flags(const View& flags, const View& like, int64_t rows);
// What compact returns: index int64, at least one entry for each of `needed` rows, and count int64 [1]. Returns the
// stride of index.
int64_t check_index(const View& index, const View& count, const View& stream, int64_t needed, const char* what);

// A table float32 [R, C] on the stream's device, R >= rows, unit column stride, rows apart. Returns its row stride.
int64_t check_table(const View& table, const View& stream, int64_t rows);
// The same where one column alone is written to: columns may lie apart, where the step from one row, or one column, to
// the next passes over the whole of the other.
int64_t check_written_table(const View& table, const View& stream, int64_t rows);
void check_neighbouring_columns(const View& table, const char* why);
float* column_of(const View& table, int64_t column);
void check_column(const char* op, int64_t column, int64_t low, int64_t high, const char* why);

// `tensor` itself where its rows have one stride, else a contiguous copy. Sets `stride`.
Tensor with_rows(const View& view, int64_t* stride);
// A new contiguous tensor of the shape, dtype and device of `like`; and others on its device.
Tensor new_like(const View& like);
Tensor new_bool(const View& like, int64_t rows, int64_t columns);
Tensor new_int64(const View& like, int64_t size);
Tensor new_rows(const View& like, int64_t rows, int64_t width);

}  // namespace void_ext
