// cpu/simd.h for AVX2 with FMA and F16C: each vector is two registers.
#pragma once

#include <immintrin.h>

namespace foldkv::avx2 {

struct F {
  __m256 a, b;
};
struct I {
  __m256i a, b;
};
struct W {
  __m256i a, b;
};

inline F splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m128i load_8x16(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline F load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(load_8x16(p)), _mm256_cvtph_ps(load_8x16(p + 8))}; }
inline __m256 bf16_to_ps(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline F load_bf16(const uint16_t* p) { return {bf16_to_ps(load_8x16(p)), bf16_to_ps(load_8x16(p + 8))}; }
inline void store(float* p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline F operator+(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F operator-(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F operator*(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F operator/(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F abs(F x) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(bit, x.a), _mm256_andnot_ps(bit, x.b)};
}
inline F rint(F x) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, kMode), _mm256_round_ps(x.b, kMode)};
}
inline F copy_sign(F magnitude, F sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, magnitude.a), _mm256_and_ps(bit, sign.a)),
          _mm256_or_ps(_mm256_andnot_ps(bit, magnitude.b), _mm256_and_ps(bit, sign.b))};
}
inline float hmax(F x) {
  float lanes[8];
  _mm256_storeu_ps(lanes, _mm256_max_ps(x.a, x.b));
  float r = lanes[0];
  for (float y : lanes) r = r > y ? r : y;
  return r;
}
inline float hmin(F x) {
  float lanes[8];
  _mm256_storeu_ps(lanes, _mm256_min_ps(x.a, x.b));
  float r = lanes[0];
  for (float y : lanes) r = r < y ? r : y;
  return r;
}
inline __m256 keep_half(__m256 x, __m256i lane, int begin, int end, __m256 other) {
  const __m256i inside = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane),
                                             _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane));
  return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(inside));
}
inline F keep(F x, int begin, int end, F other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {keep_half(x.a, lane, begin, end, other.a), keep_half(x.b, lane, begin - 8, end - 8, other.b)};
}
inline F zero_below(F y, F x, float bound) {
  const __m256 limit = _mm256_set1_ps(bound);
  return {_mm256_and_ps(_mm256_cmp_ps(x.a, limit, _CMP_GE_OQ), y.a),
          _mm256_and_ps(_mm256_cmp_ps(x.b, limit, _CMP_GE_OQ), y.b)};
}
inline __m256 scale_exp2_half(__m256 y, __m256 n) {
  const __m256i shift = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), shift));
}
inline F scale_exp2(F y, F n) { return {scale_exp2_half(y.a, n.a), scale_exp2_half(y.b, n.b)}; }

// Sums of eight 8-lane vectors, distance 4, 2, 1; lane i belongs to x[i].
template <class Add>
inline __m256 tree_sums(__m256 (&x)[8], Add add) {
  for (int i = 0; i < 4; ++i) {
    x[i] = add(_mm256_permute2f128_ps(x[i], x[i + 4], 0x20), _mm256_permute2f128_ps(x[i], x[i + 4], 0x31));
  }
  const __m256 p = add(_mm256_shuffle_ps(x[0], x[1], 0x44), _mm256_shuffle_ps(x[0], x[1], 0xee));
  const __m256 q = add(_mm256_shuffle_ps(x[2], x[3], 0x44), _mm256_shuffle_ps(x[2], x[3], 0xee));
  return add(_mm256_shuffle_ps(p, q, 0x88), _mm256_shuffle_ps(p, q, 0xdd));
}
inline __m256 add_ps(__m256 p, __m256 q) { return _mm256_add_ps(p, q); }
inline __m256 add_epi32(__m256 p, __m256 q) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_castps_si256(q)));
}
inline F sum16(const F (&v)[16]) {
  __m256 x[8], y[8];
  for (int i = 0; i < 8; ++i) {
    x[i] = _mm256_add_ps(v[i].a, v[i].b);
    y[i] = _mm256_add_ps(v[i + 8].a, v[i + 8].b);
  }
  return {tree_sums(x, add_ps), tree_sums(y, add_ps)};
}
inline I sum16(const I (&v)[16]) {
  __m256 x[8], y[8];
  for (int i = 0; i < 8; ++i) {
    x[i] = _mm256_castsi256_ps(_mm256_add_epi32(v[i].a, v[i].b));
    y[i] = _mm256_castsi256_ps(_mm256_add_epi32(v[i + 8].a, v[i + 8].b));
  }
  return {_mm256_castps_si256(tree_sums(x, add_epi32)), _mm256_castps_si256(tree_sums(y, add_epi32))};
}

inline I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline I iload(const int32_t* p) { return {load_256(p), load_256(p + 8)}; }
inline void istore(int32_t* p, I x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}
inline I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I madd(I acc, W x, W y) {
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(x.a, y.a)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(x.b, y.b))};
}
inline W wload(const int16_t* p) { return {load_256(p), load_256(p + 16)}; }
inline W wsplat_pair(const int16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, 4);
  return {_mm256_set1_epi32(pair), _mm256_set1_epi32(pair)};
}
inline __m256i widen_16(const uint8_t* p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline W widen_u8(const uint8_t* p) { return {widen_16(p), widen_16(p + 16)}; }
inline W widen_i8(const int8_t* p) {
  const auto half = [](const int8_t* from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  };
  return {half(p), half(p + 16)};
}
inline W widen_u4(const uint8_t* p) {
  const __m256i wide = widen_16(p);
  return {_mm256_and_si256(wide, _mm256_set1_epi16(15)), _mm256_srli_epi16(wide, 4)};
}
inline void interleave(W x, W y, W& lo, W& hi) {
  lo = {_mm256_unpacklo_epi16(x.a, y.a), _mm256_unpacklo_epi16(x.b, y.b)};
  hi = {_mm256_unpackhi_epi16(x.a, y.a), _mm256_unpackhi_epi16(x.b, y.b)};
}
inline void deinterleave(I lo, I hi, I& first, I& second) {
  first = {_mm256_permute2x128_si256(lo.a, hi.a, 0x20), _mm256_permute2x128_si256(lo.a, hi.a, 0x31)};
  second = {_mm256_permute2x128_si256(lo.b, hi.b, 0x20), _mm256_permute2x128_si256(lo.b, hi.b, 0x31)};
}

}  // namespace foldkv::avx2
