// cpu/simd.h for AVX-512 (F, BW, VL, DQ, VNNI).
#pragma once

#include <immintrin.h>

namespace foldkv::avx512 {

struct F {
  __m512 v;
};
struct I {
  __m512i v;
};
struct W {
  __m512i v;
};

inline F splat(float x) { return {_mm512_set1_ps(x)}; }
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline F load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline void store(float* p, F x) { _mm512_storeu_ps(p, x.v); }
inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F abs(F a) { return {_mm512_abs_ps(a.v)}; }
inline F rint(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F copy_sign(F magnitude, F sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(bit, magnitude.v), _mm512_and_ps(bit, sign.v))};
}
inline float hmax(F a) { return _mm512_reduce_max_ps(a.v); }
inline float hmin(F a) { return _mm512_reduce_min_ps(a.v); }
inline F keep(F x, int begin, int end, F other) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 mask =
      _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(begin)) & _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(end));
  return {_mm512_mask_blend_ps(mask, other.v, x.v)};
}
inline F zero_below(F y, F x, float bound) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(bound), _CMP_GE_OQ), y.v)};
}
inline F scale_exp2(F y, F n) {
  const __m512i shift = _mm512_slli_epi32(_mm512_cvtps_epi32(n.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(y.v), shift))};
}

// The order in which the tree takes its 16 inputs, so that lane i of the result belongs to input i.
constexpr int kTreeOrder[16] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};

template <class V, class Add>
inline __m512 tree_sums(const V (&a)[16], Add add) {
  __m512 x[16];
  for (int i = 0; i < 16; ++i) x[i] = a[kTreeOrder[i]];
  for (int i = 0; i < 8; ++i) {
    x[i] = add(_mm512_shuffle_f32x4(x[i], x[i + 8], 0x44), _mm512_shuffle_f32x4(x[i], x[i + 8], 0xee));
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = add(_mm512_shuffle_f32x4(x[i], x[i + 4], 0x88), _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd));
  }
  for (int i = 0; i < 2; ++i) {
    x[i] = add(_mm512_shuffle_ps(x[i], x[i + 2], 0x44), _mm512_shuffle_ps(x[i], x[i + 2], 0xee));
  }
  return add(_mm512_shuffle_ps(x[0], x[1], 0x88), _mm512_shuffle_ps(x[0], x[1], 0xdd));
}
inline F sum16(const F (&a)[16]) {
  __m512 x[16];
  for (int i = 0; i < 16; ++i) x[i] = a[i].v;
  return {tree_sums(x, [](__m512 p, __m512 q) { return _mm512_add_ps(p, q); })};
}
inline I sum16(const I (&a)[16]) {
  __m512 x[16];
  for (int i = 0; i < 16; ++i) x[i] = _mm512_castsi512_ps(a[i].v);
  return {_mm512_castps_si512(tree_sums(x, [](__m512 p, __m512 q) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_castps_si512(q)));
  }))};
}

inline I izero() { return {_mm512_setzero_si512()}; }
inline I iload(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void istore(int32_t* p, I x) { _mm512_storeu_si512(p, x.v); }
inline I to_int(F a) { return {_mm512_cvtps_epi32(a.v)}; }
inline F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
// As asm: GCC 12 copies the accumulator to and fro around the intrinsic, which costs a third of the loop.
inline I madd(I acc, W a, W b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));
  return acc;
}
inline W wload(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
inline W wsplat_pair(const int16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, 4);
  return {_mm512_set1_epi32(pair)};
}
inline W widen_u8(const uint8_t* p) {
  return {_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline W widen_i8(const int8_t* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline W widen_u4(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i low = _mm256_and_si256(wide, _mm256_set1_epi16(15));
  return {_mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_srli_epi16(wide, 4), 1)};
}
inline void interleave(W a, W b, W& lo, W& hi) {
  lo = {_mm512_unpacklo_epi16(a.v, b.v)};
  hi = {_mm512_unpackhi_epi16(a.v, b.v)};
}
inline void deinterleave(I lo, I hi, I& first, I& second) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  first = {_mm512_permutex2var_epi32(lo.v, low, hi.v)};
  second = {_mm512_permutex2var_epi32(lo.v, high, hi.v)};
}

}  // namespace foldkv::avx512
