// float16 for the host shim: storage and the conversions the kernels use. NaN becomes 0x7fff, as on the device.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

struct __half2 {
  __half x, y;
};

inline float __half2float(__half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t exponent = value.bits >> 10 & 31u;
  const uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent > 0) return __uint_as_float(sign | (exponent + 112u) << 23 | mantissa << 13);
  return std::copysign(static_cast<float>(mantissa) * 0x1p-24f, __uint_as_float(sign | 0x3f800000u));
}

inline __half __float2half_rn(float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to multiples of 2^-24, the subnormal spacing
    const float rounded = __uint_as_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (__float_as_uint(rounded) - 0x3f000000u))};
  }
  magnitude += 0xfffu + (magnitude >> 13 & 1u);
  const uint32_t half = (magnitude - 0x38000000u) >> 13;
  return {static_cast<uint16_t>(sign | (half < 0x7c00u ? half : 0x7c00u))};
}

inline float2 __half22float2(__half2 value) { return {__half2float(value.x), __half2float(value.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
