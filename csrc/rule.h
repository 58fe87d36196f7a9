// The LAC recurrence: whether a layer was active for a token, from the norms n_0 … n_L of its residual stream.
//
//   delta_l = n_{l+1} - n_l        tau_l = alpha * (max_{j<l} delta_j - min_{j<l} delta_j)        tau_0 = 0
//   active_l = not (delta_l < tau_l)
//
// One thread walks one token's history. All arithmetic is float32 and there is no a*b+c in it, so host and device
// agree bit for bit. Source: arXiv 2505.14467. Written here and nowhere else.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace void_ext {

struct LacRule {
  float low = 0.0f;
  float high = 0.0f;
  bool empty = true;

  // The verdict on a delta, given the deltas admitted so far. Equality and NaN are active, so the test is negated.
  VOID_HOST_DEVICE bool active(float delta, float alpha) const {
    const float threshold = empty ? 0.0f : alpha * (high - low);
    return !(delta < threshold);
  }

  // Admit a delta to the history. A NaN stays in the range for good, as in torch.max and torch.min: the comparisons
  // are written so that a NaN on either side is kept.
  VOID_HOST_DEVICE void admit(float delta) {
    low = (empty || delta < low || delta != delta) ? delta : low;
    high = (empty || delta > high || delta != delta) ? delta : high;
    empty = false;
  }
};

// A token's norms 0 … layer, walked before the one after the layer is known.
struct LacHistory {
  LacRule rule;
  float before;

  VOID_HOST_DEVICE LacHistory(const float* norms, const bool* executed, int64_t layer) : before(norms[0]) {
#if defined(__CUDA_ARCH__)
#pragma unroll 4
#endif
    for (int64_t l = 0; l < layer; ++l) {
      const float after = norms[l + 1];
      if (executed == nullptr || executed[l]) rule.admit(after - before);
      before = after;
    }
  }

  VOID_HOST_DEVICE bool active(float norm, float alpha) const { return rule.active(norm - before, alpha); }
};

// Whether layer `layer` was active, from norms[0 … layer + 1]. `executed`: which of the layers before it ran, null
// where all did; those that did not are no part of the history.
VOID_HOST_DEVICE bool layer_active(const float* norms, const bool* executed, int64_t layer, float alpha) {
  return LacHistory(norms, executed, layer).active(norms[layer + 1], alpha);
}

}  // namespace void_ext
