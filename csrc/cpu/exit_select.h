// kept[row] = stream[row] where one layer was active for the row. A copy, never a multiplication by a mask: 0 * inf is
// NaN.
#pragma once

#include <cstring>

#include "../args.h"
#include "../rule.h"

namespace void_ext::cpu {

inline void exit_select(const ExitSelectArgs& args, int64_t begin, int64_t end) {
  const int64_t bytes = args.dtype == DType::kFloat32 ? 4 : 2;
  for (int64_t row = begin; row < end; ++row) {
    if (!layer_active(args.norms + row * args.norms_stride, nullptr, args.layer, args.alpha)) continue;
    std::memmove(static_cast<char*>(args.kept) + row * args.kept_stride * bytes,
                 static_cast<const char*>(args.stream) + row * args.stream_stride * bytes,
                 static_cast<size_t>(args.width * bytes));
  }
}

}  // namespace void_ext::cpu
