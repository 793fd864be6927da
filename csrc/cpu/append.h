// Append on the CPU: RoPE, mean, balance, rotation, quantise, pack. The definition is quant/reference.py, the bytes agree.
#pragma once

#include "core/dynamic.h"
#include "cpu/rows.h"
#include "cpu/shaping.h"
#include "cpu/steering.h"
#include "cpu/tables.h"

namespace foldkv::FOLDKV_ISA {

inline float round_up_to_bf16(float x) {
  x = x < kMinScale ? kMinScale : x > kMaxScale ? kMaxScale : x;
  const float up = bits_to_float((float_to_bits(x) + 0xffff) & 0xffff0000);
  return up > kMaxScale ? kMaxScale : up;
}

inline I round_codes(const F& y, const F& scale, const F& zero, int bits) {
  const F top = splat(static_cast<float>((1 << bits) - 1));
  return to_int(min(max(rint(y / scale + zero), splat(0.0f)), top));
}

struct ScaleZero {
  float scale, zero;
};

// Scale and zero of a row from its least and greatest element, as stored: a bf16 and an fp16 value.
inline ScaleZero min_max_scale(float low, float high, int bits, bool stored_zero) {
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

// The codes of units on a grid; a quarter unit sends halves up.
inline F nearest_codes(const F& unit, const SearchGrid& grid) {
  const F place = (unit - splat(grid.start - 0.25f)) * splat(1.0f / grid.step);
  return min(max(rint(place), splat(0.0f)), splat(15.0f));
}

// The sum of whole numbers, each below 2^24.
inline int64_t whole_sum(const F& x) {
  float lanes[16];
  store(lanes, x);
  int64_t sum = 0;
  for (float lane : lanes) sum += static_cast<int64_t>(lane);
  return sum;
}

// search_rows of quant/dynamic.py: the codes, scale and zero of a row from low <= 0 to high >= 0. shaping: nullable.
inline ScaleZero search_row(const float* y, int d, float low, float high, const int8_t* shaping, int32_t* codes) {
  const float width = high - low, inverse = kSearchUnits / width, origin = (0.0f - low) * inverse;
  alignas(64) float units[kMaxHeadDim];
  F errors[kSearchGrids];
  for (F& sum : errors) sum = splat(0.0f);
  for (int c = 0; c < d; c += 16) {
    const F unit = rint((load(y + c) - splat(low)) * splat(inverse));
    store(units + c, unit);
    for (int i = 0; i < kSearchGrids; ++i) {
      const SearchGrid grid = search_grid(i);
      const F error = unit - splat(grid.start) - nearest_codes(unit, grid) * splat(grid.step);
      errors[i] = errors[i] + error * error;
    }
  }
  int best = 0;
  int64_t least = whole_sum(errors[0]);
  for (int i = 1; i < kSearchGrids; ++i) {
    const int64_t error = whole_sum(errors[i]);
    if (error < least) least = error, best = i;
  }
  const SearchGrid grid = search_grid(best);
  const F whole_origin = rint(splat(origin));
  alignas(64) float chosen[kMaxHeadDim];
  for (int c = 0; c < d; c += 16) store(chosen + c, nearest_codes(load(units + c), grid));
  if (shaping != nullptr) {
    alignas(64) float error[kMaxHeadDim] = {};
    for (int c = 0; c < d; c += 16) {
      store(error + c, load(chosen + c) * splat(grid.step) + splat(grid.start) - load(units + c));
    }
    shape_codes(shaping, error, grid.step, 15.0f, d, chosen);
  }
  F square = splat(0.0f), product = splat(0.0f);
  for (int c = 0; c < d; c += 16) {
    const F unit = load(units + c), code = load(chosen + c), truth = unit - whole_origin;
    istore(codes + c, to_int(code));
    square = square + truth * truth;
    product = product + truth * (code * splat(grid.step) + splat(grid.start) - whole_origin);
  }
  const float gain = static_cast<float>(whole_sum(square)) / static_cast<float>(whole_sum(product));
  const float bounded = gain < kMinGain ? kMinGain : gain > kMaxGain ? kMaxGain : gain;
  return {bf16_to_float(float_to_bf16(width * (grid.step / kSearchUnits) * bounded)),
          half_to_float(float_to_half((origin - grid.start) / grid.step))};
}

// The codes of a row on a grid of 8 bits, chosen together.
inline void shape_row(const float* y, int d, const ScaleZero& row, const int8_t* shaping, int32_t* codes) {
  alignas(64) float code[kMaxHeadDim] = {}, error[kMaxHeadDim] = {};
  const F units = splat(static_cast<float>(kShapeUnits)), bound = splat(static_cast<float>(kShapeMost));
  for (int c = 0; c < d; c += 16) {
    const F place = load(y + c) / splat(row.scale) + splat(row.zero);
    const F nearest = min(max(rint(place), splat(0.0f)), splat(255.0f));
    const F miss = units * nearest - rint(units * place);
    store(code + c, nearest);
    store(error + c, min(max(miss, splat(0.0f) - bound), bound));
  }
  shape_codes(shaping, error, static_cast<float>(kShapeUnits), 255.0f, d, code);
  for (int c = 0; c < d; c += 16) istore(codes + c, to_int(load(code + c)));
}

// Codes, scale and zero of a dynamic row. shaping: of the row's head, nullable.
inline ScaleZero quantize_row(const float* y, int d, int bits, bool stored_zero, const int8_t* shaping,
                              int32_t* codes) {
  F lowest = load(y), highest = lowest;
  for (int c = 16; c < d; c += 16) {
    lowest = min(lowest, load(y + c));
    highest = max(highest, load(y + c));
  }
  const float low = hmin(lowest) + 0.0f, high = hmax(highest);  // a zero is +0, whichever zero of the row came first
  if (stored_zero && bits == kSearchBits && low <= 0.0f && high >= 0.0f &&
      (-low > high ? -low : high) >= kLeastSearched) {
    return search_row(y, d, low, high, shaping, codes);
  }
  const ScaleZero row = min_max_scale(low, high, bits, stored_zero);
  if (shaping != nullptr && bits == kShapeBits) {
    shape_row(y, d, row, shaping, codes);
    return row;
  }
  for (int c = 0; c < d; c += 16) {
    istore(codes + c, round_codes(load(y + c), splat(row.scale), splat(row.zero), bits));
  }
  return row;
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
  int32_t codes[kMaxHeadDim];
  ScaleZero dynamic{};
  alignas(64) float direction[kMaxHeadDim];
  if (format.dynamic) {
    dynamic = quantize_row(x, d, bits, format.stored_zero, shaping_of(cache, head, d), codes);
  } else if (bits == kSteerBits && read_direction(param(kQuery), d, direction)) {
    for (int c = 0; c < d; c += 16) store(x + c, load(x + c) / load(param(kScale) + c) + load(param(kZero) + c));
    steer_row(x, direction, d, codes);
  } else {
    for (int c = 0; c < d; c += 16) {
      istore(codes + c, round_codes(load(x + c), load(param(kScale) + c), load(param(kZero) + c), bits));
    }
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
