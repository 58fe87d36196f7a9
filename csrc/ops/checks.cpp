#include "checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

namespace void_ext {

namespace {

void must(AOTITorchError error, const char* what) {
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error(std::string("void_ext: torch failed in ") + what);
}

std::string bracketed(const int64_t* values, int64_t count) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < count; ++i) out << (i == 0 ? "" : ", ") << values[i];
  out << ']';
  return out.str();
}

Tensor empty(const int64_t* sizes, int64_t dim, int32_t dtype, const View& like) {
  std::vector<int64_t> strides(static_cast<size_t>(dim));
  int64_t stride = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[static_cast<size_t>(d)] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  AtenTensorHandle handle = nullptr;
  must(aoti_torch_empty_strided(dim, sizes, strides.data(), dtype, like.device_type, like.device_index, &handle),
       "empty_strided");
  return Tensor(handle);
}

}  // namespace

View::View(const char* op, const char* name, const Tensor& tensor) : op(op), name(name), tensor(tensor) {
  const AtenTensorHandle handle = tensor.get();
  int64_t* borrowed = nullptr;
  must(aoti_torch_get_dim(handle, &dim), "dim");
  must(aoti_torch_get_sizes(handle, &borrowed), "sizes");
  sizes = borrowed;
  must(aoti_torch_get_strides(handle, &borrowed), "strides");
  strides = borrowed;
  must(aoti_torch_get_dtype(handle, &dtype), "dtype");
  must(aoti_torch_get_device_type(handle, &device_type), "device");
  must(aoti_torch_get_device_index(handle, &device_index), "device");
}

std::string View::shape() const { return bracketed(sizes, dim); }

std::string View::device() const {
  std::string out = device_type == aoti_torch_device_type_cpu()    ? "cpu"
                    : device_type == aoti_torch_device_type_cuda() ? "cuda"
                                                                   : "device type " + std::to_string(device_type);
  if (device_type != aoti_torch_device_type_cpu()) out += ":" + std::to_string(device_index);
  return out;
}

std::string dtype_name(int32_t code) {
  const struct {
    int32_t code;
    const char* name;
  } known[] = {
      {aoti_torch_dtype_float32(), "float32"},     {aoti_torch_dtype_float16(), "float16"},
      {aoti_torch_dtype_bfloat16(), "bfloat16"},   {aoti_torch_dtype_float64(), "float64"},
      {aoti_torch_dtype_bool(), "bool"},           {aoti_torch_dtype_uint8(), "uint8"},
      {aoti_torch_dtype_int8(), "int8"},           {aoti_torch_dtype_int16(), "int16"},
      {aoti_torch_dtype_int32(), "int32"},         {aoti_torch_dtype_int64(), "int64"},
      {aoti_torch_dtype_complex64(), "complex64"}, {aoti_torch_dtype_complex128(), "complex128"},
  };
  for (const auto& entry : known) {
    if (entry.code == code) return entry.name;
  }
  return "dtype code " + std::to_string(code);
}

DType check_stream(const View& view) {
  if (view.dim < 1) fail(view.op, view.name, "expected at least one dimension, [..., D], got a tensor of none");
  if (view.dtype == aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
  if (view.dtype == aoti_torch_dtype_float32()) return DType::kFloat32;
  if (view.dtype == aoti_torch_dtype_float16()) return DType::kFloat16;
  fail(view.op, view.name, "expected float32, float16 or bfloat16, got ", view.dtype_name());
}

void check_same_device(const View& view, const View& like) {
  if (view.device_type != like.device_type || view.device_index != like.device_index) {
    fail(view.op, view.name, "expected a tensor on ", like.device(), " like ", like.name, ", got one on ",
         view.device());
  }
}

void check_same_kind(const View& view, const View& like) {
  if (view.dtype != like.dtype) {
    fail(view.op, view.name, "expected ", like.dtype_name(), " like ", like.name, ", got ", view.dtype_name());
  }
  check_same_device(view, like);
}

namespace {

bool same_shape(const View& view, const View& like) {
  return view.dim == like.dim && std::equal(view.sizes, view.sizes + view.dim, like.sizes);
}

}  // namespace

bool alike(const View& view, const View& like) {
  return same_shape(view, like) && view.dtype == like.dtype && view.device_type == like.device_type &&
         view.device_index == like.device_index;
}

void check_same_shape(const View& view, const View& like) {
  if (!same_shape(view, like))
    fail(view.op, view.name, "expected shape ", like.shape(), " like ", like.name, ", got ", view.shape());
  check_same_kind(view, like);
}

void check_alpha(const char* op, double alpha) {
  if (!(std::isfinite(static_cast<float>(alpha)) && alpha >= 0))
    fail(op, "alpha", "expected a finite float32 >= 0, got ", alpha);
}

void check_vector(const View& view, int32_t dtype) {
  if (view.dtype != dtype) fail(view.op, view.name, "expected ", dtype_name(dtype), ", got ", view.dtype_name());
  if (view.dim != 1) fail(view.op, view.name, "expected one dimension, got shape ", view.shape());
}

Rows row_shape(const View& view) {
  Rows rows{1, view.sizes[view.dim - 1], 0};
  for (int64_t d = 0; d < view.dim - 1; ++d) rows.count *= view.sizes[d];
  return rows;
}

std::optional<int64_t> row_stride(const View& view) {
  const int64_t width = view.sizes[view.dim - 1];
  if (width > 1 && view.strides[view.dim - 1] != 1) return std::nullopt;
  // From the inside out: each dimension must step over what lies within it. Dimensions of size 1 have no step, and with
  // a dimension of size 0 there is nothing to step over.
  int64_t stride = width;  // where no leading dimension has more than one entry
  int64_t next = 0;
  bool found = false;
  for (int64_t d = view.dim - 2; d >= 0; --d) {
    if (view.sizes[d] == 0) return width;
    if (view.sizes[d] == 1) continue;
    if (!found) {
      stride = view.strides[d];
      found = true;
    } else if (view.strides[d] != next) {
      return std::nullopt;
    }
    next = view.strides[d] * view.sizes[d];
  }
  return stride;
}

int64_t check_mutable_rows(const View& view) {
  const std::optional<int64_t> stride = row_stride(view);
  if (!stride) {
    fail(view.op, view.name, "is written to, so expected rows of neighbouring elements with one stride, got shape ",
         view.shape(), " with strides ", bracketed(view.strides, view.dim));
  }
  const Rows rows = row_shape(view);
  if (rows.count > 1 && *stride < rows.width) {
    fail(view.op, view.name, "is written to, so expected rows that share no element, got shape ", view.shape(),
         " with strides ", bracketed(view.strides, view.dim));
  }
  return *stride;
}

void check_apart(const View& view, const View& written, bool same) {
  const std::optional<int64_t> stride = row_stride(view);
  if (!stride) return;  // with_rows will copy it first
  const Rows read = row_shape(view), target = row_shape(written);
  if (read.count == 0 || target.count == 0 || read.width == 0) return;
  const int64_t target_stride = *row_stride(written);
  const int64_t size = static_cast<int64_t>(view.tensor.element_size());
  const auto start = [](const View& of) { return reinterpret_cast<intptr_t>(of.tensor.data_ptr()); };
  const auto bytes = [&](const Rows& rows, int64_t step) { return ((rows.count - 1) * step + rows.width) * size; };
  const int64_t ahead = start(view) - start(written);
  if (ahead >= bytes(target, target_stride) || -ahead >= bytes(read, *stride)) return;
  if (*stride == target_stride) {
    if (same && ahead == 0) return;
    // Side by side in the rows of one larger tensor.
    const int64_t step = target_stride * size;
    const int64_t within = (ahead % step + step) % step;
    if (within >= target.width * size && within + read.width * size <= step) return;
  }
  fail(view.op, view.name, "expected memory apart from that of ", written.name, ", which is written to, got ",
       ahead == 0 && *stride == target_stride ? "the same rows" : "rows that overlap it");
}

Span span_of(const View& view) {
  const auto start = reinterpret_cast<intptr_t>(view.tensor.data_ptr());
  int64_t last = 0;
  for (int64_t d = 0; d < view.dim; ++d) {
    if (view.sizes[d] == 0) return {start, start};
    last += (view.sizes[d] - 1) * view.strides[d];
  }
  return {start, start + (last + 1) * static_cast<int64_t>(view.tensor.element_size())};
}

namespace {

struct Matrix {
  int64_t sizes[2], strides[2];
};

// A tensor as a matrix: its rows, where it has more dimensions than two and they have one stride.
std::optional<Matrix> matrix_of(const View& view) {
  if (view.dim == 2) return Matrix{{view.sizes[0], view.sizes[1]}, {view.strides[0], view.strides[1]}};
  if (view.dim < 1) return std::nullopt;
  const std::optional<int64_t> stride = row_stride(view);
  if (!stride) return std::nullopt;
  const Rows rows = row_shape(view);
  return Matrix{{rows.count, rows.width}, {*stride, 1}};
}

// Two matrices in one larger buffer, side by side or column by column in turns: whether they have no element in common
// though their spans meet. Both must have the same two strides, and lines that each lie within one step to the next.
bool interleaved(const View& left, const View& right) {
  const auto size = static_cast<int64_t>(left.tensor.element_size());
  if (size != static_cast<int64_t>(right.tensor.element_size())) return false;
  const std::optional<Matrix> one = matrix_of(left), other = matrix_of(right);
  if (!one || !other) return false;
  const Matrix &a = *one, &b = *other;
  if (a.strides[0] != b.strides[0] || a.strides[1] != b.strides[1]) return false;
  const int outer = a.strides[0] >= a.strides[1] ? 0 : 1, inner = 1 - outer;
  const int64_t step = a.strides[outer], near = a.strides[inner];
  if (near < 1 || (std::max(a.sizes[inner], b.sizes[inner]) - 1) * near >= step) return false;
  const int64_t bytes = span_of(right).begin - span_of(left).begin;
  if (bytes % size != 0) return false;
  // An element in common has ahead = i * step + j * near, for differences i and j of its indices. As |j * near| < step,
  // i is one of two.
  const int64_t ahead = bytes / size, below = ahead / step - (ahead % step < 0 ? 1 : 0);
  for (int64_t i = below; i <= below + 1; ++i) {
    const int64_t rest = ahead - i * step, j = rest / near;
    if (rest % near == 0 && -b.sizes[outer] < i && i < a.sizes[outer] && -b.sizes[inner] < j && j < a.sizes[inner]) {
      return false;
    }
  }
  return true;
}

}  // namespace

void check_disjoint(const View& view, const View& written) {
  if (span_of(view).overlaps(span_of(written)) && !interleaved(view, written)) {
    fail(view.op, view.name, "expected memory apart from that of ", written.name,
         ", which is written to, got some within its bounds");
  }
}

void check_written_flags(const View& flags) {
  if (flags.sizes[0] > 1 && flags.strides[0] == 0) {
    fail(flags.op, flags.name, "is written to, so expected a flag of its own for each row, got stride 0");
  }
}

int64_t check_flags(const View& flags, const View& like, int64_t rows) {
  check_vector(flags, aoti_torch_dtype_bool());
  if (flags.sizes[0] != rows) {
    fail(flags.op, flags.name, "expected shape [", rows, "], a flag for each row of ", like.name, ", got ",
         flags.shape());
  }
  check_same_device(flags, like);
  return flags.strides[0];
}

int64_t check_index(const View& index, const View& count, const View& stream, int64_t needed, const char* what) {
  check_vector(index, aoti_torch_dtype_int64());
  check_same_device(index, stream);
  if (index.sizes[0] < needed) {
    fail(index.op, index.name, "expected at least ", needed, " entries, ", what, ", got shape ", index.shape());
  }
  check_vector(count, aoti_torch_dtype_int64());
  check_same_device(count, stream);
  if (count.sizes[0] != 1) fail(count.op, count.name, "expected shape [1], got ", count.shape());
  return index.strides[0];
}

namespace {

void check_table_shape(const View& table, const View& stream, int64_t rows) {
  if (table.dtype != aoti_torch_dtype_float32())
    fail(table.op, table.name, "expected float32, got ", table.dtype_name());
  if (table.dim != 2) fail(table.op, table.name, "expected two dimensions, [rows, columns], got shape ", table.shape());
  check_same_device(table, stream);
  if (table.sizes[0] < rows) {
    fail(table.op, table.name, "expected at least ", rows, " rows, one for each row of ", stream.name, ", got shape ",
         table.shape());
  }
}

[[noreturn]] void fail_sharing(const View& table) {
  fail(table.op, table.name, "expected rows that share no element, got shape ", table.shape(), " with strides ",
       bracketed(table.strides, table.dim));
}

}  // namespace

void check_neighbouring_columns(const View& table, const char* why) {
  if (table.sizes[1] > 1 && table.strides[1] != 1) {
    fail(table.op, table.name, "expected neighbouring columns (stride 1)", why, ", got strides ",
         bracketed(table.strides, table.dim));
  }
}

int64_t check_table(const View& table, const View& stream, int64_t rows) {
  check_table_shape(table, stream, rows);
  check_neighbouring_columns(table, "");
  if (rows > 1 && table.strides[0] < table.sizes[1]) fail_sharing(table);
  return table.strides[0];
}

int64_t check_written_table(const View& table, const View& stream, int64_t rows) {
  check_table_shape(table, stream, rows);
  const int64_t row = table.strides[0], column = table.strides[1], all = table.sizes[0], columns = table.sizes[1];
  const bool positive = (all <= 1 || row >= 1) && (columns <= 1 || column >= 1);
  const bool apart = all <= 1 || columns <= 1 || row > (columns - 1) * column || column > (all - 1) * row;
  if (!positive || !apart) fail_sharing(table);
  return row;
}

float* column_of(const View& table, int64_t column) {
  return static_cast<float*>(table.tensor.data_ptr()) + column * table.strides[1];
}

void check_column(const char* op, int64_t column, int64_t low, int64_t high, const char* why) {
  if (column < low || column > high) {
    fail(op, "column", "expected ", low, " to ", high, ", ", why, ", got ", column);
  }
}

Tensor with_rows(const View& view, int64_t* stride) {
  if (const std::optional<int64_t> found = row_stride(view)) {
    *stride = *found;
    return view.tensor;
  }
  *stride = view.sizes[view.dim - 1];
  return torch::stable::contiguous(view.tensor);
}

Tensor new_like(const View& like) { return empty(like.sizes, like.dim, like.dtype, like); }

Tensor new_bool(const View& like, int64_t rows, int64_t columns) {
  const std::array<int64_t, 2> sizes = {rows, columns};
  return empty(sizes.data(), 2, aoti_torch_dtype_bool(), like);
}

Tensor new_int64(const View& like, int64_t size) { return empty(&size, 1, aoti_torch_dtype_int64(), like); }

Tensor new_rows(const View& like, int64_t rows, int64_t width) {
  const std::array<int64_t, 2> sizes = {rows, width};
  return empty(sizes.data(), 2, like.dtype, like);
}

}  // namespace void_ext
