// Rows of codes or floats to memory.
#pragma once

#include <cstdint>

#include "core/dynamic.h"
#include "core/layout.h"
#include "cuda/rows.cuh"

namespace foldkv::cuda {

template <int Bits, int V>
__device__ __forceinline__ void store_codes(uint8_t* to, const uint32_t (&code)[V]) {
  constexpr int kPerWord = 32 / Bits < V ? 32 / Bits : V;
  constexpr uint32_t kMagic = 0x4b000000;  // the bits of 2^23 that come with each code
  uint32_t words[V / kPerWord];
#pragma unroll
  for (int w = 0; w < V / kPerWord; ++w) {
    uint32_t word = 0, magic = 0;
#pragma unroll
    for (int j = 0; j < kPerWord; ++j) {
      word += code[w * kPerWord + j] << (Bits * j);
      magic += kMagic << (Bits * j);
    }
    words[w] = word - magic;
  }
  store_words<V * Bits / 8>(to, words);
}

// Elements stored as they are, cut to the largest finite one. Each float codec of codecs.def brings kMax and pair().
struct fp32 {
  static constexpr float kMax = 0x1.fffffep127f;
};
struct fp16 {
  static constexpr float kMax = 65504.0f;
  __device__ static uint32_t pair(float a, float b) {
    return static_cast<uint32_t>(__half_as_ushort(__float2half_rn(a))) |
           static_cast<uint32_t>(__half_as_ushort(__float2half_rn(b))) << 16;
  }
};
struct bf16 {
  static constexpr float kMax = kMaxScale;
  __device__ static uint32_t pair(float a, float b) {
    return static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(a))) |
           static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(b))) << 16;
  }
};

template <class Element, int Bits, int V>
__device__ __forceinline__ void store_floats(uint8_t* to, const float (&x)[V]) {
  uint32_t words[V * Bits / 32];
#pragma unroll
  for (int i = 0; i < V * Bits / 32; ++i) {
    const auto cut = [](float y) { return fminf(fmaxf(y, -Element::kMax), Element::kMax); };
    if constexpr (Bits == 32) {
      words[i] = __float_as_uint(cut(x[i]));
    } else {
      words[i] = Element::pair(cut(x[2 * i]), cut(x[2 * i + 1]));
    }
  }
  store_words<V * Bits / 8>(to, words);
}

// x is what Float codecs store, code what Integer ones do.
template <int V>
__device__ __forceinline__ void store_row(int codec, uint8_t* to, const float (&x)[V], const uint32_t (&code)[V]) {
  switch (codec) {
#define FOLDKV_STORE_Float(name, bits) store_floats<name, bits>(to, x)
#define FOLDKV_STORE_Integer(name, bits) store_codes<bits>(to, code)
#define FOLDKV_CODEC(id, name, bits, kind) \
  case id: FOLDKV_STORE_##kind(name, bits); break;
#include "codecs.def"
#undef FOLDKV_CODEC
#undef FOLDKV_STORE_Integer
#undef FOLDKV_STORE_Float
  }
}

}  // namespace foldkv::cuda
