// Stands in for CUDA's header of this name when g++ compiles the kernels for the CPU: the qualifiers, built-in
// variables and intrinsics that the .cuh files use, and nothing else. Threads are fibers (../fibers.h). What rounds on
// the device rounds here alike (compile with -ffp-contract=off), except rsqrtf, which CUDA computes to within 2 ulp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../fibers.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
// A section of its own, so that every block can find its shared memory full of NaN (fibers.cpp).
#define __shared__ static __attribute__((section("void_ext_shared")))

using void_ext::hostshim::blockDim;
using void_ext::hostshim::blockIdx;
using void_ext::hostshim::dim3;
using void_ext::hostshim::gridDim;
using void_ext::hostshim::threadIdx;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

struct float2 {
  float x, y;
};

inline void __syncthreads() { void_ext::hostshim::wait_for_block(); }

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float __shfl_xor_sync(uint32_t mask, float value, int distance) {
  const int lane = void_ext::hostshim::lane();
  return __uint_as_float(void_ext::hostshim::exchange(mask, __float_as_uint(value), lane ^ distance));
}

// Of whole warps alone: the lanes' bits meet in five exchanges.
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  const int lane = void_ext::hostshim::lane();
  uint32_t bits = predicate ? 1u << lane : 0u;
  for (int distance = 16; distance > 0; distance /= 2) {
    bits |= void_ext::hostshim::exchange(mask, bits, lane ^ distance);
  }
  return bits;
}

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
