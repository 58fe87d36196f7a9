// The LAC recurrence: whether a layer was active for a token, from the norms n_0 … n_L of its residual stream.
//
//   delta_l = n_{l+1} - n_l        tau_l = alpha * (max_{j<l} delta_j - min_{j<l} delta_j)        tau_0 = 0
//   active_l = not (delta_l < tau_l)
//
// One thread walks one token's history. All arithmetic is float32 and there is no a*b+c in it, so host and device
// agree bit for bit. Source: arXiv 2505.14467. Written here and nowhere else.
#pragma once

#if defined(__CUDACC__)
#define VOID_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VOID_HOST_DEVICE inline
#endif

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

}  // namespace void_ext
