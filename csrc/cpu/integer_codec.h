// The inner loops of an integer codec. Sums of products of 16-bit numbers in int32 are exact, so the order of summation
// is free and every instruction set gives the same bits. A codec brings: kBits, widen(bytes) -> 32 codes,
// channel(lane) -> which of the 32 channels a lane holds.
#pragma once

#include "cpu/simd.h"
#include "cpu/tables.h"

namespace foldkv::FOLDKV_ISA {

using cpu::kRows;
using cpu::kUnit;
using cpu::QueryTile;
using cpu::ValueTile;

// Any width: one code after another, lanes in channel order.
template <int Bits>
inline W widen_codes(const uint8_t* p) {
  int16_t codes[kUnit];
  for (int i = 0; i < kUnit; ++i)
    codes[i] = static_cast<int16_t>(p[i * Bits / 8] >> (i * Bits % 8) & ((1 << Bits) - 1));
  return wload(codes);
}

template <class C>
struct IntegerKernels {
  static constexpr int kUnitBytes = kUnit * C::kBits / 8;
  static constexpr int kMid = 1 << (C::kBits - 1);
  static constexpr int kMaxCode = (1 << C::kBits) - 1;

  // A row of d channels is d / 32 whole units, and half a unit where d is an odd multiple of 16 (not kWhole).
  template <bool kWhole>
  static W unit(const uint8_t* row, int index, int d) {
    const uint8_t* p = row + index * kUnitBytes;
    if (kWhole || (index + 1) * kUnit <= d) return C::widen(p);
    uint8_t half[kUnitBytes] = {};
    std::memcpy(half, p, kUnitBytes / 2);
    return C::widen(half);
  }

  // Steps of the queries: as fine as int32 sums over d channels allow, at most 16 bits.
  static float query_steps(int d) {
    const int64_t limit = ((int64_t{1} << 31) - 1) / (int64_t{kMaxCode} * d);
    return static_cast<float>(limit < 32767 ? limit : 32767);
  }

  static void prepare(QueryTile& tile, int d) {
    const float steps = query_steps(d);
    const int units = ceil_div(d, kUnit);
    for (int r = 0; r < tile.rows; ++r) {
      const float* q = tile.q[r];
      F largest = splat(0.0f);
      for (int c = 0; c < d; c += 16) largest = max(largest, abs(load(q + c)));
      const float absmax = hmax(largest);
      const float inverse = absmax > 0.0f ? steps / absmax : 0.0f;
      tile.q_unit[r] = absmax / steps;
      int32_t rounded[kMaxHeadDim];
      for (int c = 0; c < d; c += 16) istore(rounded + c, to_int(load(q + c) * splat(inverse)));
      int64_t sum = 0;
      for (int c = 0; c < d; ++c) sum += rounded[c];
      tile.q_mid[r] = static_cast<float>(sum * kMid);
      for (int u = 0; u < units; ++u) {
        for (int lane = 0; lane < kUnit; ++lane) {
          const int c = u * kUnit + C::channel(lane);
          tile.q_int[r][u * kUnit + lane] = c < d ? static_cast<int16_t>(rounded[c]) : int16_t{0};
        }
      }
    }
  }

  // R query rows against 16 tokens, 16 / R tokens at a time.
  template <int R, bool kWhole>
  static void dots_rows(const QueryTile& tile, int r0, const uint8_t* rows, int d, float* out, int stride) {
    constexpr int T = 16 / R;
    const int units = ceil_div(d, kUnit), bytes = row_bytes(C::kBits, d);
    for (int t0 = 0; t0 < 16; t0 += T) {
      I acc[16];
      for (I& a : acc) a = izero();
      for (int u = 0; u < units; ++u) {
        W codes[T];
        for (int t = 0; t < T; ++t) codes[t] = unit<kWhole>(rows + (t0 + t) * bytes, u, d);
        for (int r = 0; r < R; ++r) {
          const W q = wload(&tile.q_int[r0 + r][u * kUnit]);
          for (int t = 0; t < T; ++t) acc[r * T + t] = madd(acc[r * T + t], codes[t], q);
        }
      }
      float sums[16];
      foldkv::FOLDKV_ISA::store(sums, to_float(sum16(acc)));
      for (int r = 0; r < R; ++r) std::memcpy(out + (r0 + r) * stride + t0, sums + r * T, T * sizeof(float));
    }
  }

  static void dots(const QueryTile& tile, const uint8_t* rows, int d, float* out, int stride) {
    for_row_blocks(tile.rows, [&](auto block, int r) {
      if (d % kUnit == 0)
        dots_rows<block(), true>(tile, r, rows, d, out, stride);
      else
        dots_rows<block(), false>(tile, r, rows, d, out, stride);
    });
  }

  static void clear(ValueTile& tile, int d) {
    for (int r = 0; r < tile.rows; ++r) std::memset(tile.acc_int[r], 0, ceil_div(d, kUnit) * kUnit * sizeof(int32_t));
  }

  // R weight rows, U units of channels from unit u0 on; tokens in pairs.
  template <int R, int U, bool kWhole>
  static void add_rows(ValueTile& tile, int r0, int u0, int begin, int end, const uint8_t* rows, int d) {
    const int bytes = row_bytes(C::kBits, d);
    I acc[R][U][2];
    for (int r = 0; r < R; ++r) {
      for (int u = 0; u < U; ++u) {
        for (int half = 0; half < 2; ++half)
          acc[r][u][half] = iload(&tile.acc_int[r0 + r][(u0 + u) * kUnit + half * 16]);
      }
    }
    for (int t = begin; t < end; t += 2) {
      const uint8_t* row = rows + static_cast<int64_t>(t - begin) * bytes;
      for (int u = 0; u < U; ++u) {
        W lo, hi;
        interleave(unit<kWhole>(row, u0 + u, d), unit<kWhole>(row + bytes, u0 + u, d), lo, hi);
        for (int r = 0; r < R; ++r) {
          const W pair = wsplat_pair(&tile.w_int[r0 + r][t]);
          acc[r][u][0] = madd(acc[r][u][0], lo, pair);
          acc[r][u][1] = madd(acc[r][u][1], hi, pair);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int u = 0; u < U; ++u) {
        for (int half = 0; half < 2; ++half)
          istore(&tile.acc_int[r0 + r][(u0 + u) * kUnit + half * 16], acc[r][u][half]);
      }
    }
  }

  template <int R>
  static void add_units(ValueTile& tile, int r0, int begin, int end, const uint8_t* rows, int d) {
    const int whole = d / kUnit;
    int u = 0;
    for (; u + 2 <= whole; u += 2) add_rows<R, 2, true>(tile, r0, u, begin, end, rows, d);
    for (; u < whole; ++u) add_rows<R, 1, true>(tile, r0, u, begin, end, rows, d);
    if (d % kUnit != 0) add_rows<R, 1, false>(tile, r0, u, begin, end, rows, d);
  }

  // Pairs start at even tokens, so that both lie in one page; a pair's tokens outside the range have weight 0.
  static void accumulate(ValueTile& tile, int begin, int end, const uint8_t* rows, int d) {
    rows -= (begin & 1) * row_bytes(C::kBits, d);
    begin -= begin & 1;
    for_row_blocks(tile.rows, [&](auto block, int r) { add_units<block()>(tile, r, begin, end, rows, d); });
  }

  static void finish(const ValueTile& tile, int d, float (*out)[kMaxHeadDim]) {
    for (int r = 0; r < tile.rows; ++r) {
      float sums[kMaxHeadDim];
      for (int u = 0; u < ceil_div(d, kUnit); ++u) {
        I first, second;
        deinterleave(iload(&tile.acc_int[r][u * kUnit]), iload(&tile.acc_int[r][u * kUnit + 16]), first, second);
        float lanes[kUnit];
        foldkv::FOLDKV_ISA::store(lanes, to_float(first));
        foldkv::FOLDKV_ISA::store(lanes + 16, to_float(second));
        for (int lane = 0; lane < kUnit; ++lane) sums[u * kUnit + C::channel(lane)] = lanes[lane];
      }
      const F unit_value = splat(tile.w_unit[r]), middle = splat(tile.w_sum[r] * static_cast<float>(kMid));
      for (int c = 0; c < d; c += 16) {
        foldkv::FOLDKV_ISA::store(&out[r][c], (load(sums + c) - middle) * unit_value);
      }
    }
  }

  static void pack(const int32_t* codes, int d, uint8_t* row) {
    constexpr int kPerByte = 8 / C::kBits;
    for (int i = 0; i < d / kPerByte; ++i) {
      unsigned byte = 0;
      for (int j = 0; j < kPerByte; ++j) byte |= static_cast<unsigned>(codes[i * kPerByte + j]) << (j * C::kBits);
      row[i] = static_cast<uint8_t>(byte);
    }
  }
};

template <class C>
const cpu::CodecOps& integer_codec(int id) {
  using K = IntegerKernels<C>;
  static const cpu::CodecOps ops = {id, K::prepare, K::dots, K::clear, K::accumulate, K::finish, K::pack, nullptr};
  return ops;
}

}  // namespace foldkv::FOLDKV_ISA
