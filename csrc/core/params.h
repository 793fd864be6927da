// What a kernel is told: plain pointers and numbers, the same for every backend. Torch stays outside.
#pragma once

#include "core/layout.h"

namespace foldkv {

enum class DType { Float32, Float16, BFloat16 };

// Strided rows [tokens, heads, d], last dimension contiguous; strides in elements.
struct Rows {
  const void* data;
  DType dtype;
  int64_t token_stride, head_stride;
};

// Division by a number known before launch, as a multiplication: right for x with x * n < 2^32.
struct Divisor {
  int n;
  uint32_t inverse;  // 2^32 / n + 1
  Divisor() = default;
  explicit Divisor(int of) : n(of), inverse(of > 1 ? static_cast<uint32_t>((uint64_t{1} << 32) / of) + 1 : 0) {}
  FOLDKV_HD int divide(uint32_t x) const {
    return static_cast<int>(n == 1 ? x : static_cast<uint32_t>((uint64_t{x} * inverse) >> 32));
  }
};

// K or V of one layer.
struct Cache {
  uint8_t* codes;       // [num_pages, h_kv, page_size * row_bytes]
  uint8_t* meta;        // [num_pages, h_kv, page_size * meta_bytes]; unused unless the format is dynamic
  const float* params;  // [5, h_kv, d]: static scale, zero, mean, balance, direction of queries
  const int8_t* shaping;  // [h_kv, d, d], nullable: what choosing codes together weighs errors by (core/shaping.h)
  Format format;
};

struct AppendParams {
  Rows k, v;                // [num_tokens, h_kv, d]
  Cache k_cache, v_cache;
  const int64_t* slots;     // [num_tokens]; negative skips
  const float* cos;         // [max_pos, rot / 2], nullable: no RoPE
  const float* sin;         // same
  const int64_t* positions; // [num_tokens]; with cos
  int64_t* nonfinite;       // [1], nullable: elements met that are NaN or infinite
  int64_t num_pages;        // of the pools; the device skips slots past them
  int64_t max_pos;          // rows of cos and sin; the device skips rows with other positions
  int num_tokens, h_kv, d, page_size, rot_half;
  bool interleaved;
};

struct PlanParams {
  const int32_t* seq_lens;      // [batch]
  const int32_t* cu_seqlens_q;  // [batch + 1]
  const int32_t* seq_starts;    // [batch], nullable
  int32_t* plan;
  int batch, window_left, tile_q, num_workers, max_items, max_tiles;
  int kv_heads;                 // that attend by the plan
  int grouped_q;                // sequences with at most so many new tokens have their chunks in groups
  int64_t max_partials;
};

struct AttendParams {
  Rows q;                       // [num_rows, h_q, d]
  Cache k_cache, v_cache;
  const int32_t* block_table;   // [batch, table_stride]
  const int32_t* seq_lens;      // [batch]
  const int32_t* cu_seqlens_q;  // [batch + 1]
  const int32_t* seq_starts;    // [batch], nullable
  const int32_t* plan;
  float* workspace;             // max_partials * partial_floats(h_q, d), then batch * h_kv * kGroupFloats
  void* out;                    // [num_rows, h_q, d] contiguous, dtype of q
  float* lse;                   // [num_rows, h_q], nullable
  const float* sinks;           // [h_q], nullable
  float softmax_scale, softcap;
  int batch, num_rows, h_q, h_kv, d, page_size, window_left;
  Divisor kv_heads, group;      // h_kv; query heads of each
  int64_t table_stride, max_partials;
  int64_t plan_ints;            // numbers in `plan`
  uint32_t max_page;            // the last page of the pools
  bool joins;                   // on a GPU: the last block of a tile that is cut merges it; else combine does
  bool copies_queries;          // on a GPU: heads of q are 16-bit numbers that can be copied 16 bytes at a time
  int grid_workers;             // on a GPU: blocks for each kv head; 0 for as many as the device holds
};

struct MergeParams {
  const void* o;     // [parts, rows, d]
  const float* lse;  // [parts, rows], natural log
  void* out;         // [rows, d]
  float* out_lse;    // [rows]
  DType dtype;
  int64_t parts, rows, d;
};

}  // namespace foldkv
