// Sixteen float32 lanes and the loads and stores that widen to them and round from them, for the instruction set this
// file is compiled for. Included only by row_kernels.cpp; all in an anonymous namespace, so that code compiled for one
// instruction set can never be merged with another's.
//
// Every set does the same sixteen-lane arithmetic in the same order, without fused multiply-add: a row's norm has the
// same bits on every CPU. Rounding is to nearest even, subnormals are kept, NaN stays NaN, as in torch.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace void_ext::cpu {
namespace {

constexpr int64_t kLanes = 16;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

struct Vec {
  __m512 v;
};

inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec splat(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
// Each half to the upper half of its lane, the lower one zero, in one permutation: a conversion and a shift are two.
inline Vec widen_bf16(__m256i half) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return {_mm512_castsi512_ps(
      _mm512_maskz_permutexvar_epi16(0xaaaaaaaau, _mm512_slli_epi32(lane, 16), _mm512_castsi256_si512(half)))};
}
inline Vec load(const BFloat16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load(const Float16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }

inline void lanes(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }

// The float32 bits of x rounded to bfloat16, the lower half still to be dropped.
inline __m512i round_bf16(Vec x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
}
inline __m256i narrow_bf16(Vec x) {
#if defined(__AVX512BF16__)
  // One instruction for six, but it loses subnormals and keeps the payloads of NaN.
  constexpr int kQuietNan = 0x01, kSubnormal = 0x20, kSignalingNan = 0x80;
  const __mmask16 special = _mm512_fpclass_ps_mask(x.v, kQuietNan | kSubnormal | kSignalingNan);
  if (__builtin_expect(special == 0, 1)) {
    const __m256bh half = _mm512_cvtneps_pbh(x.v);
    __m256i bits;
    std::memcpy(&bits, &half, sizeof(bits));
    return bits;
  }
#endif
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(x), 16));
}
inline Vec rounded(Vec x, const float*) { return x; }
inline Vec rounded(Vec x, const BFloat16*) {
#if defined(__AVX512BF16__)
  return widen_bf16(narrow_bf16(x));
#else
  return {_mm512_castsi512_ps(_mm512_and_si512(round_bf16(x), _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
#endif
}
inline Vec rounded(Vec x, const Float16*) {
  return {_mm512_cvtph_ps(_mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}

// Each store returns what it stored, widened again.
inline Vec store(float* p, Vec x) {
  _mm512_storeu_ps(p, x.v);
  return x;
}
inline Vec store(BFloat16* p, Vec x) {
  const __m256i half = narrow_bf16(x);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  return widen_bf16(half);
}
inline Vec store(Float16* p, Vec x) {
  const __m256i half = _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  return {_mm512_cvtph_ps(half)};
}

// The same, past the caches; p is aligned to the vector.
inline Vec stream(float* p, Vec x) {
  _mm512_stream_ps(p, x.v);
  return x;
}
inline Vec stream(BFloat16* p, Vec x) {
  const __m256i half = narrow_bf16(x);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), half);
  return widen_bf16(half);
}
inline Vec stream(Float16* p, Vec x) {
  const __m256i half = _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), half);
  return {_mm512_cvtph_ps(half)};
}
inline void drain_streams() { _mm_sfence(); }

#elif defined(__AVX2__) && defined(__F16C__)

struct Vec {
  __m256 low, high;
};

inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vec splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }

inline __m128i load_eight(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m256 widen_bf16(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Vec load(const BFloat16* p) { return {widen_bf16(load_eight(p)), widen_bf16(load_eight(p + 8))}; }
inline Vec load(const Float16* p) { return {_mm256_cvtph_ps(load_eight(p)), _mm256_cvtph_ps(load_eight(p + 8))}; }

inline void lanes(float* p, Vec x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}

// The float32 bits of x rounded to bfloat16, the lower half still to be dropped.
inline __m256i round_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
}
inline __m256 upper_half(__m256i bits) {
  return _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
// The upper halves of sixteen lanes. packus works within 128-bit halves; the permutation puts the quarters in order.
inline __m256i packed(__m256i low, __m256i high) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_srli_epi32(low, 16), _mm256_srli_epi32(high, 16)), 0xd8);
}
inline __m128i to_half(__m256 x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline Vec rounded(Vec x, const float*) { return x; }
inline Vec rounded(Vec x, const BFloat16*) { return {upper_half(round_bf16(x.low)), upper_half(round_bf16(x.high))}; }
inline Vec rounded(Vec x, const Float16*) {
  return {_mm256_cvtph_ps(to_half(x.low)), _mm256_cvtph_ps(to_half(x.high))};
}

// Each store returns what it stored, widened again.
inline Vec store(float* p, Vec x) {
  lanes(p, x);
  return x;
}
inline Vec store(BFloat16* p, Vec x) {
  const __m256i low = round_bf16(x.low), high = round_bf16(x.high);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed(low, high));
  return {upper_half(low), upper_half(high)};
}
inline Vec store(Float16* p, Vec x) {
  const __m128i low = to_half(x.low), high = to_half(x.high);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), low);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + 1, high);
  return {_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)};
}

// The same, past the caches; p is aligned to the vector.
inline Vec stream(float* p, Vec x) {
  _mm256_stream_ps(p, x.low);
  _mm256_stream_ps(p + 8, x.high);
  return x;
}
inline Vec stream(BFloat16* p, Vec x) {
  const __m256i low = round_bf16(x.low), high = round_bf16(x.high);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), packed(low, high));
  return {upper_half(low), upper_half(high)};
}
inline Vec stream(Float16* p, Vec x) {
  const __m128i low = to_half(x.low), high = to_half(x.high);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), low);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p) + 1, high);
  return {_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)};
}
inline void drain_streams() { _mm_sfence(); }

#else

// Any CPU. The compiler turns these loops into whatever vectors the platform guarantees.
struct Vec {
  float v[kLanes];
};

template <typename From, typename To>
inline To bit_cast(From from) {
  static_assert(sizeof(From) == sizeof(To));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return bit_cast<uint32_t, float>(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  uint32_t bits;
  if (exponent == 0x0f800000u) {  // infinity and NaN
    bits = magnitude + 0x70000000u;
  } else if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24, by adding it to 2^-14 and taking that away
    bits = bit_cast<float, uint32_t>(bit_cast<uint32_t, float>(magnitude + 0x38800000u) -
                                     bit_cast<uint32_t, float>(0x38800000u));
  } else {
    bits = magnitude + 0x38000000u;
  }
  return bit_cast<uint32_t, float>(bits | sign);
}

inline float narrow(float x, const float*) { return x; }
inline BFloat16 narrow(float x, const BFloat16*) {
  const uint32_t bits = bit_cast<float, uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}
inline Float16 narrow(float x, const Float16*) {
  const uint32_t bits = bit_cast<float, uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {  // NaN
    half = 0x7e00u;
  } else if (magnitude >=
             0x47800000u) {  // 2^16 and above; what rounds up to it from below carries into infinity by itself
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves mantissa * 2^-24 in the low bits, rounded
    half = bit_cast<float, uint32_t>(bit_cast<uint32_t, float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(half | sign)};
}

inline Vec splat(float x) {
  Vec out;
  for (float& lane : out.v) lane = x;
  return out;
}
inline Vec zero() { return splat(0.0f); }
inline Vec operator+(const Vec& a, const Vec& b) {
  Vec out;
  for (int64_t i = 0; i < kLanes; ++i) out.v[i] = a.v[i] + b.v[i];
  return out;
}
inline Vec operator-(const Vec& a, const Vec& b) {
  Vec out;
  for (int64_t i = 0; i < kLanes; ++i) out.v[i] = a.v[i] - b.v[i];
  return out;
}
inline Vec operator*(const Vec& a, const Vec& b) {
  Vec out;
  for (int64_t i = 0; i < kLanes; ++i) out.v[i] = a.v[i] * b.v[i];
  return out;
}
inline void lanes(float* p, const Vec& x) { std::memcpy(p, x.v, sizeof(x.v)); }

template <typename T>
inline Vec load(const T* p) {
  Vec out;
  for (int64_t i = 0; i < kLanes; ++i) out.v[i] = widen(p[i]);
  return out;
}
template <typename T>
inline Vec rounded(const Vec& x, const T* type) {
  Vec out;
  for (int64_t i = 0; i < kLanes; ++i) out.v[i] = widen(narrow(x.v[i], type));
  return out;
}
// Returns what it stored, widened again.
template <typename T>
inline Vec store(T* p, const Vec& x) {
  Vec out;
  for (int64_t i = 0; i < kLanes; ++i) {
    p[i] = narrow(x.v[i], p);
    out.v[i] = widen(p[i]);
  }
  return out;
}

template <typename T>
inline Vec stream(T* p, const Vec& x) {
  return store(p, x);
}
inline void drain_streams() {}

#endif

// --- partial vectors: the lanes beyond `count` read as zero and are not written ---

template <typename T>
inline Vec load_part(const T* p, int64_t count) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, static_cast<size_t>(count) * sizeof(T));
  return load(buffer);
}
template <typename T>
inline Vec store_part(T* p, Vec x, int64_t count) {
  T buffer[kLanes];
  const Vec stored = store(buffer, x);
  std::memcpy(p, buffer, static_cast<size_t>(count) * sizeof(T));
  return stored;
}

// --- a row's sum of squares ---

// Four chains of sixteen lanes, folded into a total every kFold elements, so that the rounding error of a sum grows
// with kFold / 64 + width / kFold instead of width / 64.
class SumOfSquares {
 public:
  static constexpr int64_t kFold = 4096;

  void add(Vec x, int chain) { chains_[chain] = chains_[chain] + x * x; }
  void fold() {
    total_ = total_ + ((chains_[0] + chains_[1]) + (chains_[2] + chains_[3]));
    for (Vec& chain : chains_) chain = zero();
  }
  float finish() {
    fold();
    float x[kLanes];
    lanes(x, total_);
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
      for (int64_t i = 0; i < width; ++i) x[i] += x[i + width];
    }
    return x[0];
  }

 private:
  Vec chains_[4] = {zero(), zero(), zero(), zero()};
  Vec total_ = zero();
};

// Calls whole(i, chain) for every whole vector of a row, part(i, count, chain) for the rest, and fold() in between: the
// order of a row's sum, which depends on its width alone.
template <typename Whole, typename Part, typename Fold>
inline void walk_row(int64_t width, const Whole& whole, const Part& part, const Fold& fold) {
  int64_t i = 0;
  while (width - i >= SumOfSquares::kFold) {
    for (const int64_t end = i + SumOfSquares::kFold; i < end; i += 4 * kLanes) {
      whole(i, 0);
      whole(i + kLanes, 1);
      whole(i + 2 * kLanes, 2);
      whole(i + 3 * kLanes, 3);
    }
    fold();
  }
  for (; width - i >= 4 * kLanes; i += 4 * kLanes) {
    whole(i, 0);
    whole(i + kLanes, 1);
    whole(i + 2 * kLanes, 2);
    whole(i + 3 * kLanes, 3);
  }
  for (; width - i >= kLanes; i += kLanes) whole(i, 0);
  if (i < width) part(i, width - i, 1);
}

}  // namespace
}  // namespace void_ext::cpu
