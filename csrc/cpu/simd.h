// The short list of vector operations that the CPU kernels are written in; one implementation for each instruction set.
//
//   F: 16 floats    I: 16 int32    W: 32 int16
//
// Every operation gives the same bits on every instruction set: floats are rounded once for each written operation
// (fma is one), and sums run in the order stated. So a result does not depend on the machine it was computed on.
//
//   F splat(float), load(const float*), load_f16(const uint16_t*), load_bf16(const uint16_t*); void store(float*, F)
//   F operator + - * /, fma(a, b, c) = a * b + c, max, min, abs, rint (half to even); float hmax(F), hmin(F)
//   F keep(F x, int begin, int end, F other): lane i keeps x where begin <= i < end
//   F zero_below(F y, F x, float bound): y where x >= bound, otherwise 0
//   F scale_exp2(F y, F n): y * 2^n for integers n in [-126, 127] and a normal result
//   F sum16(const F (&a)[16]): lane i is the sum of a[i], lanes added at distance 8, 4, 2, 1
//   I izero(), iload(const int32_t*); void istore(int32_t*, I); I to_int(F) (half to even); F to_float(I)
//   I madd(I acc, W a, W b): acc[i] + a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1];  I sum16(const I (&a)[16])
//   W wload(const int16_t*), wsplat_pair(const int16_t*): two numbers repeated, widen_u8(const uint8_t*): 32 bytes
//   W widen_i8(const int8_t*): 32 signed bytes
//   W widen_u4(const uint8_t*): 16 bytes, the low nibbles to lanes 0..15 and the high ones to lanes 16..31
//   void interleave(W a, W b, W& lo, W& hi): pairs (a[i], b[i]), in an order that `deinterleave` undoes:
//   void deinterleave(I lo, I hi, I& first, I& second): lanes 0..15 and 16..31 of what `interleave` took
#pragma once

#define FOLDKV_ISA_ID_plain 0
#define FOLDKV_ISA_ID_avx2 1
#define FOLDKV_ISA_ID_avx512 2
#define FOLDKV_CONCAT_(a, b) a##b
#define FOLDKV_CONCAT(a, b) FOLDKV_CONCAT_(a, b)
#define FOLDKV_ISA_ID FOLDKV_CONCAT(FOLDKV_ISA_ID_, FOLDKV_ISA)

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if FOLDKV_ISA_ID == 2
#include "cpu/simd_avx512.h"
#elif FOLDKV_ISA_ID == 1
#include "cpu/simd_avx2.h"
#else
#include "cpu/simd_plain.h"
#endif

namespace foldkv::FOLDKV_ISA {

inline float hsum(F x) {
  float lanes[16];
  store(lanes, x);
  for (int step = 8; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  }
  return lanes[0];
}

// Calls fn(block, first row) for blocks of 4, 2 and 1 rows, `block` a compile-time number.
template <class Fn>
inline void for_row_blocks(int rows, Fn fn) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) fn(std::integral_constant<int, 4>{}, r);
  for (; r + 2 <= rows; r += 2) fn(std::integral_constant<int, 2>{}, r);
  for (; r < rows; ++r) fn(std::integral_constant<int, 1>{}, r);
}

// exp(x) for x <= 0, -inf included, within 1e-7 relative; 0 below -87. Polynomial: a Chebyshev fit of
// (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2.
inline F exp_nonpositive(F x) {
  constexpr float kLowest = -87.0f;
  const F clamped = max(x, splat(kLowest));
  const F n = rint(clamped * splat(1.44269504f));
  F r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  F y = splat(0x1.a124f2p-13f);
  y = fma(y, r, splat(0x1.6d4324p-10f));
  y = fma(y, r, splat(0x1.1110e0p-7f));
  y = fma(y, r, splat(0x1.5554eap-5f));
  y = fma(y, r, splat(0x1.555556p-3f));
  y = fma(y, r, splat(0.5f));
  y = fma(y, r * r, r + splat(1.0f));
  return zero_below(scale_exp2(y, n), x, kLowest);
}

inline float exp_nonpositive(float x) {
  float lanes[16];
  store(lanes, exp_nonpositive(splat(x)));
  return lanes[0];
}

// cap * tanh(x / cap)
inline F soft_cap(F x, float cap) {
  const F scaled = x / splat(cap);
  const F e = exp_nonpositive(splat(-2.0f) * abs(scaled));
  const F magnitude = splat(cap) * ((splat(1.0f) - e) / (splat(1.0f) + e));
  return copy_sign(magnitude, x);
}

}  // namespace foldkv::FOLDKV_ISA
