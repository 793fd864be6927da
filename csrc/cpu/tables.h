// What one instruction set offers: the kernels, and for each codec the few inner loops that know its bits.
#pragma once

#include "core/params.h"
#include "core/schedule.h"

namespace foldkv::cpu {

constexpr int kRows = 16;  // query rows that share one pass over the keys
constexpr int kUnit = 32;  // channels an integer codec widens at once; rows are padded to it

// The query rows of a tile, made ready for one K format.
struct QueryTile {
  alignas(64) float q[kRows][kMaxHeadDim];        // effective queries: balanced, rotated, static scale folded in
  alignas(64) int16_t q_int[kRows][kMaxHeadDim];  // integer codecs: q / q_unit, in the codec's lane order
  float q_unit[kRows];                            // what one step of q_int is worth; 1 for float codecs
  float q_mid[kRows];                             // sum of q_int, times the middle code
  int rows;
};

// The weights of a chunk's tokens, and the sums they weigh.
struct ValueTile {
  alignas(64) float w[kRows][kChunkSize];        // probability, times the token's V scale where that is dynamic
  alignas(64) int16_t w_int[kRows][kChunkSize];  // integer codecs: w / w_unit
  union {
    alignas(64) int32_t acc_int[kRows][kMaxHeadDim];  // integer codecs: sum of w_int * code, in interleaved order
    alignas(64) float acc[kRows][kMaxHeadDim];        // float codecs: sum of w * value
  };
  float w_unit[kRows];
  float w_sum[kRows];  // sum of w_int
  int rows;
};

struct CodecOps {
  int id;
  // Codes are taken as code - middle code here; what a zero differs from the middle is the caller's to add, exactly.
  // K: fill q_int, q_unit, q_mid from q [rows][d].
  void (*prepare)(QueryTile&, int d);
  // K: out[r * stride + t], dot of query row r with the codes of token t, for 16 tokens that lie one after another.
  void (*dots)(const QueryTile&, const uint8_t* rows, int d, float* out, int stride);
  // V: clear the sums.
  void (*clear)(ValueTile&, int d);
  // V: add the tokens begin .. end - 1 of the chunk, which lie in one page; `rows` is the row of token `begin`.
  void (*accumulate)(ValueTile&, int begin, int end, const uint8_t* rows, int d);
  // V: out[r][c] = w_unit * (sum - w_sum * middle code), natural channel order; float codecs: the sum.
  void (*finish)(const ValueTile&, int d, float (*out)[kMaxHeadDim]);
  // Bytes of a row: integer codes [d], or finite values [d] that are cut to the type's range.
  void (*pack)(const int32_t* codes, int d, uint8_t* row);
  void (*store)(const float* values, int d, uint8_t* row);
};

struct IsaOps {
  const char* name;
  const CodecOps* codecs[kNumCodecs];
  // One token of one kv head, K and V: returns the number of non-finite elements met.
  int (*append_row)(const AppendParams&, const IsaOps&, int token, int head);
  void (*attend_item)(const AttendParams&, const IsaOps&, const WorkItem&, int kv_head);
  void (*merge_item)(const AttendParams&, const IsaOps&, const MergeItem&, int kv_head);
  void (*merge_row)(const MergeParams&, int64_t row);
};

// The table in use: the best that this machine runs, or the one that FOLDKV_ISA names. Null if that one cannot run.
const IsaOps* isa();
// Names of the tables built in and able to run here, best first, null-terminated.
const char* const* isa_names();

}  // namespace foldkv::cpu
