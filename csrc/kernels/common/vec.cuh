// A row is cut into packs of 16 bytes; pack p belongs to thread p mod (threads per row). An aligned row moves its packs
// with 128-bit accesses, any other row element by element: the same element stays with the same thread, at the same
// place in its sum, so that alignment never changes a bit of the result.
#pragma once

#include <cstdint>

#include "dtypes.cuh"

namespace void_ext::kernels {

constexpr int kPackBytes = 16;
constexpr int kPackWords = kPackBytes / 4;

// Packs a thread holds at once: as many loads of each operand are in flight before the first is used.
constexpr int kPacksPerThread = 4;

template <typename T>
constexpr int kPackSize = kPackBytes / static_cast<int>(sizeof(typename Element<T>::Bits));

struct alignas(kPackBytes) Pack {
  uint32_t word[kPackWords];
};

// Rows are addressed with 64 bits, packs within a row with 32: fewer instructions, and room for 2^32 elements a row.
constexpr int64_t kMaxPacks = int64_t{1} << 30;

template <typename T>
__host__ __device__ __forceinline__ uint32_t pack_count(int64_t width) {
  return static_cast<uint32_t>((width + kPackSize<T> - 1) / kPackSize<T>);
}

// Whether rows at `pointer + row * stride` all start on a pack boundary.
template <typename T>
inline bool rows_aligned(const void* pointer, int64_t stride) {
  return reinterpret_cast<uintptr_t>(pointer) % kPackBytes == 0 && stride % kPackSize<T> == 0;
}

// `index` must be below pack_count. Elements past the row's end read as zero, which adds nothing to a sum of squares.
template <typename T, bool kAligned>
__device__ __forceinline__ Pack load_pack(const typename Element<T>::Bits* row, uint32_t index, int64_t width) {
  if constexpr (kAligned) {
    return reinterpret_cast<const Pack*>(row)[index];
  } else {
    constexpr int kPerWord = kPackSize<T> / kPackWords;
    row += static_cast<int64_t>(index) * kPackSize<T>;
    const int64_t left = width - static_cast<int64_t>(index) * kPackSize<T>;
    Pack pack{};
#pragma unroll
    for (int i = 0; i < kPackSize<T>; ++i) {
      if (i < left) pack.word[i / kPerWord] |= static_cast<uint32_t>(row[i]) << (i % kPerWord * 16);
    }
    return pack;
  }
}

// Packs first, first + blockDim.x, … of a row of `packs`, as many as a thread holds at once; `first` must be one of
// them. Beyond the row's end an aligned row gives its last pack again, which costs no memory traffic and no branch
// between the loads, so that all of them are on their way before the first is used. Whoever reads `h` leaves those out.
template <typename T, bool kAligned>
__device__ __forceinline__ void load_packs(const typename Element<T>::Bits* row, uint32_t first, uint32_t packs,
                                           int64_t width, Pack (&h)[kPacksPerThread]) {
#pragma unroll
  for (int k = 0; k < kPacksPerThread; ++k) {
    const uint32_t index = first + k * blockDim.x;
    if constexpr (kAligned) {
      h[k] = load_pack<T, true>(row, index < packs ? index : packs - 1, width);
    } else {
      h[k] = index < packs ? load_pack<T, false>(row, index, width) : Pack{};
    }
  }
}

template <typename T, bool kAligned>
__device__ __forceinline__ void store_pack(typename Element<T>::Bits* row, uint32_t index, int64_t width,
                                           const Pack& pack) {
  if constexpr (kAligned) {
    reinterpret_cast<Pack*>(row)[index] = pack;
  } else {
    using Bits = typename Element<T>::Bits;
    constexpr int kPerWord = kPackSize<T> / kPackWords;
    row += static_cast<int64_t>(index) * kPackSize<T>;
    const int64_t left = width - static_cast<int64_t>(index) * kPackSize<T>;
#pragma unroll
    for (int i = 0; i < kPackSize<T>; ++i) {
      if (i < left) row[i] = static_cast<Bits>(pack.word[i / kPerWord] >> (i % kPerWord * 16));
    }
  }
}

template <typename T>
__device__ __forceinline__ void widen(const Pack& pack, float (&x)[kPackSize<T>]) {
#pragma unroll
  for (int i = 0; i < kPackWords; ++i) Element<T>::widen(pack.word[i], x + i * (kPackSize<T> / kPackWords));
}

template <typename T>
__device__ __forceinline__ Pack narrow(const float (&x)[kPackSize<T>]) {
  Pack pack;
#pragma unroll
  for (int i = 0; i < kPackWords; ++i) pack.word[i] = Element<T>::narrow(x + i * (kPackSize<T> / kPackWords));
  return pack;
}

}  // namespace void_ext::kernels
