// The rows that are on, in order: their index, every row's place among them, their count. Serial: a place hangs on all
// flags before it, and a flag is a byte.
#pragma once

#include "../args.h"

namespace void_ext::cpu {

inline void compact(const CompactArgs& args) {
  int64_t count = 0;
  for (int64_t row = 0; row < args.rows; ++row) {
    const bool on = args.on[row * args.on_stride];
    args.inverse[row] = on ? count : -1;
    if (on) args.index[count++] = row;
  }
  for (int64_t i = count; i < args.rows; ++i) args.index[i] = -1;
  *args.count = count;
}

}  // namespace void_ext::cpu
