// ||stream|| of every row of several streams; bit for bit row_l2norm's.
#pragma once

#include <algorithm>

#include "../args.h"
#include "row_kernels.h"

namespace void_ext::cpu {

// Over the rows of the first stream, then those of the next, and so on: begin and end count all of them.
inline void streams_l2norm(const StreamsL2NormArgs& args, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t stream = begin / args.rows, first = begin % args.rows;
    const int64_t last = std::min(args.rows, first + end - begin);
    row_kernels().row_l2norm(args.one(stream), first, last);
    begin += last - first;
  }
}

}  // namespace void_ext::cpu
