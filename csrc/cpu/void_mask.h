// The LAC rule down each row of a norm table; serial within a row, rows in parallel.
#pragma once

#include "../args.h"
#include "../rule.h"

namespace void_ext::cpu {

inline void void_mask(const VoidMaskArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* norms = args.norms + row * args.norms_stride;
    const bool* executed = args.executed == nullptr ? nullptr : args.executed + row * args.executed_stride;
    bool* active = args.active + row * args.active_stride;
    LacRule rule;
    for (int64_t layer = 0; layer < args.layers; ++layer) {
      const bool ran = executed == nullptr || executed[layer];
      const float delta = norms[layer + 1] - norms[layer];
      active[layer] = ran && rule.active(delta, args.alpha);
      if (ran) rule.admit(delta);
    }
  }
}

}  // namespace void_ext::cpu
