// out[i] = stream[index[i]] for i in [begin, end), a part of the rows below the count. Indices were checked.
#pragma once

#include <cstring>

#include "../args.h"

namespace void_ext::cpu {

inline void gather_rows(const GatherRowsArgs& args, int64_t begin, int64_t end) {
  const int64_t bytes = args.dtype == DType::kFloat32 ? 4 : 2;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = args.index[i * args.index_stride];
    std::memcpy(static_cast<char*>(args.out) + i * args.out_stride * bytes,
                static_cast<const char*>(args.stream) + row * args.stream_stride * bytes,
                static_cast<size_t>(args.width * bytes));
  }
}

}  // namespace void_ext::cpu
