// cpu/simd.h in plain C++: right everywhere, and what the vector versions are held against.
#pragma once

#include "core/float16.h"

namespace foldkv::plain {

struct F {
  float v[16];
};
struct I {
  int32_t v[16];
};
struct W {
  int16_t v[32];
};

template <class T, class Op>
inline T lanes(Op op) {
  T r;
  for (int i = 0; i < static_cast<int>(sizeof(r.v) / sizeof(r.v[0])); ++i) r.v[i] = op(i);
  return r;
}

inline F splat(float x) {
  return lanes<F>([=](int) { return x; });
}
inline F load(const float* p) {
  return lanes<F>([=](int i) { return p[i]; });
}
inline F load_f16(const uint16_t* p) {
  return lanes<F>([=](int i) { return half_to_float(p[i]); });
}
inline F load_bf16(const uint16_t* p) {
  return lanes<F>([=](int i) { return bf16_to_float(p[i]); });
}
inline void store(float* p, const F& x) { std::memcpy(p, x.v, sizeof(x.v)); }
inline F operator+(const F& a, const F& b) {
  return lanes<F>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F operator-(const F& a, const F& b) {
  return lanes<F>([&](int i) { return a.v[i] - b.v[i]; });
}
inline F operator*(const F& a, const F& b) {
  return lanes<F>([&](int i) { return a.v[i] * b.v[i]; });
}
inline F operator/(const F& a, const F& b) {
  return lanes<F>([&](int i) { return a.v[i] / b.v[i]; });
}
inline F fma(const F& a, const F& b, const F& c) {
  return lanes<F>([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
inline F max(const F& a, const F& b) {
  return lanes<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F min(const F& a, const F& b) {
  return lanes<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F abs(const F& a) {
  return lanes<F>([&](int i) { return std::fabs(a.v[i]); });
}
inline F rint(const F& a) {
  return lanes<F>([&](int i) { return std::nearbyint(a.v[i]); });
}
inline F copy_sign(const F& magnitude, const F& sign) {
  return lanes<F>([&](int i) { return std::copysign(magnitude.v[i], sign.v[i]); });
}
inline float hmax(const F& a) {
  float r = a.v[0];
  for (float x : a.v) r = r > x ? r : x;
  return r;
}
inline float hmin(const F& a) {
  float r = a.v[0];
  for (float x : a.v) r = r < x ? r : x;
  return r;
}
inline F keep(const F& x, int begin, int end, const F& other) {
  return lanes<F>([&](int i) { return begin <= i && i < end ? x.v[i] : other.v[i]; });
}
inline F zero_below(const F& y, const F& x, float bound) {
  return lanes<F>([&](int i) { return x.v[i] >= bound ? y.v[i] : 0.0f; });
}
inline F scale_exp2(const F& y, const F& n) {
  return lanes<F>([&](int i) {
    uint32_t bits;
    std::memcpy(&bits, &y.v[i], 4);
    bits += static_cast<uint32_t>(static_cast<int32_t>(n.v[i])) << 23;
    float r;
    std::memcpy(&r, &bits, 4);
    return r;
  });
}

template <class T, class E>
inline T tree_sums(const T (&a)[16]) {
  T r;
  for (int k = 0; k < 16; ++k) {
    E x[16];
    std::memcpy(x, a[k].v, sizeof(x));
    for (int step = 8; step > 0; step /= 2) {
      for (int i = 0; i < step; ++i) x[i] += x[i + step];
    }
    r.v[k] = x[0];
  }
  return r;
}
inline F sum16(const F (&a)[16]) { return tree_sums<F, float>(a); }
inline I sum16(const I (&a)[16]) { return tree_sums<I, int32_t>(a); }

inline I izero() {
  return lanes<I>([](int) { return 0; });
}
inline I iload(const int32_t* p) {
  return lanes<I>([=](int i) { return p[i]; });
}
inline void istore(int32_t* p, const I& x) { std::memcpy(p, x.v, sizeof(x.v)); }
inline I to_int(const F& a) {
  return lanes<I>([&](int i) { return static_cast<int32_t>(std::nearbyint(a.v[i])); });
}
inline F to_float(const I& a) {
  return lanes<F>([&](int i) { return static_cast<float>(a.v[i]); });
}
inline I madd(const I& acc, const W& a, const W& b) {
  return lanes<I>([&](int i) { return acc.v[i] + a.v[2 * i] * b.v[2 * i] + a.v[2 * i + 1] * b.v[2 * i + 1]; });
}
inline W wload(const int16_t* p) {
  return lanes<W>([=](int i) { return p[i]; });
}
inline W wsplat_pair(const int16_t* p) {
  return lanes<W>([=](int i) { return p[i & 1]; });
}
inline W widen_u8(const uint8_t* p) {
  return lanes<W>([=](int i) { return static_cast<int16_t>(p[i]); });
}
inline W widen_i8(const int8_t* p) {
  return lanes<W>([=](int i) { return static_cast<int16_t>(p[i]); });
}
inline W widen_u4(const uint8_t* p) {
  return lanes<W>([=](int i) { return static_cast<int16_t>(i < 16 ? p[i] & 15 : p[i - 16] >> 4); });
}
inline void interleave(const W& a, const W& b, W& lo, W& hi) {
  lo = lanes<W>([&](int i) { return i & 1 ? b.v[i / 2] : a.v[i / 2]; });
  hi = lanes<W>([&](int i) { return i & 1 ? b.v[16 + i / 2] : a.v[16 + i / 2]; });
}
inline void deinterleave(const I& lo, const I& hi, I& first, I& second) {
  first = lo;
  second = hi;
}

}  // namespace foldkv::plain
