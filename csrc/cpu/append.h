// Append on the CPU: RoPE, mean, balance, rotation, quantise, pack. The definition is quant/reference.py, the bytes agree.
#pragma once

#include "cpu/rows.h"
#include "cpu/tables.h"

namespace foldkv::FOLDKV_ISA {

constexpr float kMaxZero =
    1024.0f;  // a dynamic step is at least absmax / 1024: the fp16 zero stays exact to half a step
constexpr float kMaxDynamic =
    0x1p100f;  // dynamic formats cut to this magnitude, so that no sum of a rotation overflows
constexpr float kMinScale = 0x1p-126f;
constexpr float kMaxScale = 0x1.fep127f;  // largest bf16

inline float round_up_to_bf16(float x) {
  x = x < kMinScale ? kMinScale : x > kMaxScale ? kMaxScale : x;
  const float up = bits_to_float((float_to_bits(x) + 0xffff) & 0xffff0000);
  return up > kMaxScale ? kMaxScale : up;
}

struct ScaleZero {
  float scale, zero;
};

// Scale and zero of one row, as stored: a bf16 and an fp16 value.
inline ScaleZero dynamic_scale(const float* y, int d, int bits, bool stored_zero) {
  F lowest = load(y), highest = lowest;
  for (int c = 16; c < d; c += 16) {
    lowest = min(lowest, load(y + c));
    highest = max(highest, load(y + c));
  }
  const float low = hmin(lowest) + 0.0f, high = hmax(highest);  // a zero is +0, whichever zero of the row came first
  const float absmax = std::fabs(low) > std::fabs(high) ? std::fabs(low) : std::fabs(high);
  const bool constant = low == high;
  const float mid = static_cast<float>(1 << (bits - 1)), top = static_cast<float>((1 << bits) - 1);
  if (!stored_zero) {
    if (absmax == 0.0f) return {1.0f, mid};
    return {round_up_to_bf16(constant ? absmax : absmax / (mid - 1.0f)), mid};
  }
  float scale = 1.0f;
  if (constant && absmax > 0.0f) {
    scale = bits_to_float(float_to_bits(absmax < kMinScale ? kMinScale : absmax) & 0x7f800000);
  } else if (absmax > 0.0f) {
    const float range = high / top - low / top, least = absmax / kMaxZero;
    scale = round_up_to_bf16(range > least ? range : least);
  }
  return {scale, half_to_float(float_to_half(-(low / scale)))};
}

inline void repair(float* x, int d, bool dynamic) {
  float bound = 0.0f;
  for (int c = 0; c < d; ++c) {
    if (is_finite(x[c]) && std::fabs(x[c]) > bound) bound = std::fabs(x[c]);
  }
  for (int c = 0; c < d; ++c) {
    if (x[c] != x[c]) {
      x[c] = 0.0f;
    } else if (dynamic && !is_finite(x[c])) {
      x[c] = std::copysign(bound, x[c]);
    }
  }
}

// Writes one row; returns how many of its elements were not finite.
inline int encode_row(const Cache& cache, const cpu::CodecOps& codec, float* x, int d, int h_kv, int head,
                      int page_size, int64_t slot) {
  const Format& format = cache.format;
  const int bits = kCodecs[format.codec].bits;
  const int64_t page = slot / page_size;
  const int offset = static_cast<int>(slot % page_size);
  uint8_t* row = cache.codes + token_offset(page, head, offset, h_kv, page_size, row_bytes(bits, d));
  const int nonfinite = count_nonfinite(x, d);
  if (nonfinite > 0) repair(x, d, format.dynamic);
  if (codec.store != nullptr) {
    codec.store(x, d, row);
    return nonfinite;
  }
  const auto param = [&](ParamRow which) { return cache.params + (which * h_kv + head) * d; };
  const F limit = splat(format.dynamic ? kMaxDynamic : INFINITY);
  for (int c = 0; c < d; c += 16) {
    const F y = (load(x + c) - load(param(kMean) + c)) / load(param(kBalance) + c);
    store(x + c, min(max(y, splat(0.0f) - limit), limit));
  }
  if (format.rotate) hadamard(x, d);
  const F top = splat(static_cast<float>((1 << bits) - 1));
  const ScaleZero dynamic = format.dynamic ? dynamic_scale(x, d, bits, format.stored_zero) : ScaleZero{};
  int32_t codes[kMaxHeadDim];
  for (int c = 0; c < d; c += 16) {
    const F scale = format.dynamic ? splat(dynamic.scale) : load(param(kScale) + c);
    const F zero = format.dynamic ? splat(dynamic.zero) : load(param(kZero) + c);
    istore(codes + c, to_int(min(max(rint(load(x + c) / scale + zero), splat(0.0f)), top)));
  }
  codec.pack(codes, d, row);
  if (format.dynamic) {
    const uint16_t words[2] = {float_to_bf16(dynamic.scale), float_to_half(dynamic.zero)};
    uint8_t* meta = cache.meta + token_offset(page, head, offset, h_kv, page_size, format.meta_bytes());
    std::memcpy(meta, words, format.meta_bytes());
  }
  return nonfinite;
}

inline void rope(float* x, const float* cos, const float* sin, int half, bool interleaved) {
  for (int i = 0; i < half; ++i) {
    float& first = x[interleaved ? 2 * i : i];
    float& second = x[interleaved ? 2 * i + 1 : i + half];
    const float a = first, b = second;
    first = a * cos[i] - b * sin[i];
    second = b * cos[i] + a * sin[i];
  }
}

inline int append_row(const AppendParams& p, const cpu::IsaOps& isa, int token, int head) {
  const int64_t slot = p.slots[token];
  if (slot < 0) return 0;
  alignas(64) float x[kMaxHeadDim];
  read_row(p.k, token, head, p.d, x);
  if (p.cos != nullptr) {
    const int64_t at = p.positions[token] * p.rot_half;
    rope(x, p.cos + at, p.sin + at, p.rot_half, p.interleaved);
  }
  int nonfinite = encode_row(p.k_cache, *isa.codecs[p.k_cache.format.codec], x, p.d, p.h_kv, head, p.page_size, slot);
  read_row(p.v, token, head, p.d, x);
  nonfinite += encode_row(p.v_cache, *isa.codecs[p.v_cache.format.codec], x, p.d, p.h_kv, head, p.page_size, slot);
  return nonfinite;
}

}  // namespace foldkv::FOLDKV_ISA
