// Formats and the bytes of a page, for host and device. Mirror: quant/layout.py; pages: docs/format.md.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FOLDKV_HD __host__ __device__
#else
#define FOLDKV_HD
#endif

namespace foldkv {

enum class Kind { Float, Integer };

struct Codec {
  int id;
  const char* name;
  int bits;
  Kind kind;
};

constexpr Codec kCodecs[] = {
#define FOLDKV_CODEC(id, name, bits, kind) {id, #name, bits, Kind::kind},
#include "codecs.def"
#undef FOLDKV_CODEC
};
constexpr int kNumCodecs = sizeof(kCodecs) / sizeof(kCodecs[0]);
constexpr int kMaxHeadDim = 512;

// Rows of a params tensor, fp32 [5, h_kv, d].
enum ParamRow { kScale = 0, kZero = 1, kMean = 2, kBalance = 3, kQuery = 4, kNumParamRows = 5 };

// How K, or V, is stored; the bits of the code are quant.spec.Format.code.
struct Format {
  int codec;         // index into kCodecs, which is its id
  bool dynamic;      // scales per token and head, computed on append
  bool stored_zero;  // dynamic and asymmetric: an fp16 zero follows the bf16 scale
  bool rotate;       // Hadamard before quantisation

  FOLDKV_HD static constexpr Format decode(int64_t code) {
    return {static_cast<int>(code & 0xff), (code >> 8 & 1) != 0, (code >> 9 & 1) != 0, (code >> 10 & 1) != 0};
  }
  FOLDKV_HD constexpr int meta_bytes() const { return !dynamic ? 0 : stored_zero ? 4 : 2; }
};

// Bytes of the codes of one token of one head; channels in order, the lowest in the lowest bits.
FOLDKV_HD constexpr int row_bytes(int bits, int d) { return d * bits / 8; }

// A pool is [num_pages, h_kv, page_size * bytes_per_token]; this is where a token of a head starts.
FOLDKV_HD constexpr int64_t token_offset(int64_t page, int head, int offset, int h_kv, int page_size,
                                         int bytes_per_token) {
  return ((page * h_kv + head) * page_size + offset) * bytes_per_token;
}

// Size of the diagonal blocks of the rotation: the largest power of two that divides d.
FOLDKV_HD constexpr int hadamard_block(int d) { return d & -d; }

static_assert(row_bytes(4, 128) == 64 && row_bytes(8, 128) == 128 && row_bytes(16, 96) == 192, "row sizes");
static_assert(hadamard_block(96) == 32 && hadamard_block(128) == 128, "rotation blocks");

}  // namespace foldkv
