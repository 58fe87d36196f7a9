// A row copied by its threads. T stands for every type of its size: elements are moved, never read as numbers.
#pragma once

#include "vec.cuh"

namespace void_ext::kernels {

template <typename T, bool kAligned>
__device__ __forceinline__ void copy_row(const typename Element<T>::Bits* from, typename Element<T>::Bits* to,
                                         int64_t width, uint32_t packs) {
  for (uint32_t first = threadIdx.x; first < packs; first += kPacksPerThread * blockDim.x) {
    Pack h[kPacksPerThread];
    load_packs<T, kAligned>(from, first, packs, width, h);
#pragma unroll
    for (int k = 0; k < kPacksPerThread; ++k) {
      const uint32_t index = first + k * blockDim.x;
      if (index < packs) store_pack<T, kAligned>(to, index, width, h[k]);
    }
  }
}

// Calls `body` with the tag of an element type of the size that `dtype` has.
template <typename Body>
int with_size_of(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(TypeTag<float>{});
    case DType::kFloat16:
    case DType::kBFloat16:
      return body(TypeTag<__nv_bfloat16>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace void_ext::kernels
