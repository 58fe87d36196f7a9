// Row elements as 32-bit words: float32 one a word, float16 and bfloat16 two, the first in the low half. Widening to
// float32 is exact; narrowing rounds to nearest even and keeps subnormals, as torch does.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../../args.h"

namespace void_ext::kernels {

template <typename To, typename From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as reinterprets, it does not convert");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename T>
struct Element;

template <>
struct Element<float> {
  using Bits = uint32_t;
  static __device__ __forceinline__ void widen(uint32_t word, float* x) { x[0] = __uint_as_float(word); }
  static __device__ __forceinline__ uint32_t narrow(const float* x) { return __float_as_uint(x[0]); }
};

template <>
struct Element<__half> {
  using Bits = uint16_t;
  static __device__ __forceinline__ void widen(uint32_t word, float* x) {
    const float2 pair = __half22float2(bits_as<__half2>(word));
    x[0] = pair.x;
    x[1] = pair.y;
  }
  static __device__ __forceinline__ uint32_t narrow(const float* x) {
    return bits_as<uint32_t>(__floats2half2_rn(x[0], x[1]));
  }
};

template <>
struct Element<__nv_bfloat16> {
  using Bits = uint16_t;
  static __device__ __forceinline__ void widen(uint32_t word, float* x) {
    x[0] = __uint_as_float(word << 16);
    x[1] = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t narrow(const float* x) {
    return bits_as<uint32_t>(__floats2bfloat162_rn(x[0], x[1]));
  }
};

template <typename T>
struct TypeTag {
  using Type = T;
};

// Calls `body` with the tag of the element type `dtype` stands for.
template <typename Body>
int with_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(TypeTag<float>{});
    case DType::kFloat16:
      return body(TypeTag<__half>{});
    case DType::kBFloat16:
      return body(TypeTag<__nv_bfloat16>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace void_ext::kernels
