// The inner loops of a float codec: fp32 sums, channel c in lane c mod 16, tokens in order. A codec brings: its element
// type, kMax, load16(elements) -> F, and from_float.
#pragma once

#include "cpu/simd.h"
#include "cpu/tables.h"

namespace foldkv::FOLDKV_ISA {

using cpu::kRows;
using cpu::QueryTile;
using cpu::ValueTile;

template <class C>
struct FloatKernels {
  using Element = typename C::Element;

  static const Element* elements(const uint8_t* row) { return reinterpret_cast<const Element*>(row); }

  static void prepare(QueryTile& tile, int) {
    for (int r = 0; r < tile.rows; ++r) {
      tile.q_unit[r] = 1.0f;
      tile.q_mid[r] = 0.0f;
    }
  }

  template <int R>
  static void dots_rows(const QueryTile& tile, int r0, const uint8_t* rows, int d, float* out, int stride) {
    constexpr int T = 16 / R;
    const int bytes = d * static_cast<int>(sizeof(Element));
    for (int t0 = 0; t0 < 16; t0 += T) {
      F acc[16];
      for (F& a : acc) a = splat(0.0f);
      for (int c = 0; c < d; c += 16) {
        F k[T];
        for (int t = 0; t < T; ++t) k[t] = C::load16(elements(rows + (t0 + t) * bytes) + c);
        for (int r = 0; r < R; ++r) {
          const F q = load(&tile.q[r0 + r][c]);
          for (int t = 0; t < T; ++t) acc[r * T + t] = fma(q, k[t], acc[r * T + t]);
        }
      }
      float sums[16];
      foldkv::FOLDKV_ISA::store(sums, sum16(acc));
      for (int r = 0; r < R; ++r) std::memcpy(out + (r0 + r) * stride + t0, sums + r * T, T * sizeof(float));
    }
  }

  static void dots(const QueryTile& tile, const uint8_t* rows, int d, float* out, int stride) {
    for_row_blocks(tile.rows, [&](auto block, int r) { dots_rows<block()>(tile, r, rows, d, out, stride); });
  }

  static void clear(ValueTile& tile, int d) {
    for (int r = 0; r < tile.rows; ++r) std::memset(tile.acc[r], 0, d * sizeof(float));
  }

  template <int R, int U>
  static void add_rows(ValueTile& tile, int r0, int c0, int begin, int end, const uint8_t* rows, int d) {
    F acc[R][U];
    for (int r = 0; r < R; ++r) {
      for (int u = 0; u < U; ++u) acc[r][u] = load(&tile.acc[r0 + r][c0 + 16 * u]);
    }
    for (int t = begin; t < end; ++t) {
      const Element* row = elements(rows) + static_cast<int64_t>(t - begin) * d + c0;
      F v[U];
      for (int u = 0; u < U; ++u) v[u] = C::load16(row + 16 * u);
      for (int r = 0; r < R; ++r) {
        const F w = splat(tile.w[r0 + r][t]);
        for (int u = 0; u < U; ++u) acc[r][u] = fma(w, v[u], acc[r][u]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int u = 0; u < U; ++u) foldkv::FOLDKV_ISA::store(&tile.acc[r0 + r][c0 + 16 * u], acc[r][u]);
    }
  }

  template <int R>
  static void add_channels(ValueTile& tile, int r0, int begin, int end, const uint8_t* rows, int d) {
    int c = 0;
    for (; c + 64 <= d; c += 64) add_rows<R, 4>(tile, r0, c, begin, end, rows, d);
    for (; c < d; c += 16) add_rows<R, 1>(tile, r0, c, begin, end, rows, d);
  }

  static void accumulate(ValueTile& tile, int begin, int end, const uint8_t* rows, int d) {
    for_row_blocks(tile.rows, [&](auto block, int r) { add_channels<block()>(tile, r, begin, end, rows, d); });
  }

  static void finish(const ValueTile& tile, int d, float (*out)[kMaxHeadDim]) {
    for (int r = 0; r < tile.rows; ++r) std::memcpy(out[r], tile.acc[r], d * sizeof(float));
  }

  static void store(const float* values, int d, uint8_t* row) {
    for (int c = 0; c < d; ++c) {
      const float x = values[c] > C::kMax ? C::kMax : values[c] < -C::kMax ? -C::kMax : values[c];
      const Element e = C::from_float(x);
      std::memcpy(row + c * sizeof(Element), &e, sizeof(Element));
    }
  }
};

template <class C>
const cpu::CodecOps& float_codec(int id) {
  using K = FloatKernels<C>;
  static const cpu::CodecOps ops = {id, K::prepare, K::dots, K::clear, K::accumulate, K::finish, nullptr, K::store};
  return ops;
}

}  // namespace foldkv::FOLDKV_ISA
