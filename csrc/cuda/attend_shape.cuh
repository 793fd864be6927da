// Sizes of the attention kernel, and where things lie in its shared memory.
#pragma once

#include "core/schedule.h"
#include "cuda/ptx.cuh"

namespace foldkv::cuda {

constexpr int kThreads = 128, kWarps = 4;
constexpr int kEmpty = -(1 << 29);  // the running maximum, an integer power of 2, of a state that has seen nothing

// Rows of kUnits units of 16 bytes, placed so that 8 rows read at the same unit come from different banks.
// Rows of 256 bytes and more lie in parts of 128, each the same part of all rows.
template <int kUnits>
struct Swizzle {
  static constexpr int kPartUnits = kUnits % 8 == 0 ? 8 : kUnits, kParts = kUnits / kPartUnits;
  static constexpr int kPitch = kPartUnits * 16;  // bytes from row to row
  static constexpr int kLog = kUnits % 8 == 0 ? 3 : kUnits % 4 == 0 ? 2 : kUnits % 2 == 0 ? 1 : 0;
  // Whether the copy engine can lay rows down so: it swizzles by address, within 128, 64 or 32 bytes.
  static constexpr bool kTiles = kLog == 0 || kPartUnits == 1 << kLog;
  // What the unit's index is xor-ed with.
  __device__ static __forceinline__ int of(int row) { return (row >> (3 - kLog)) & ((1 << kLog) - 1); }
};

// Tokens that a block scores before it weighs values. A sequence whose query rows fit one tile of 8 has its whole chunk at
// once (narrow.cuh); with more rows it goes by 64 tokens, in tiles of 16 rows (wide.cuh). So a row's bits depend on how many
// rows its own sequence has, not on which kernel serves it.
constexpr int kNarrowRows = 8, kWideRows = 16;
constexpr int kNarrowBlock = 256, kWideBlock = 64;

// What code is for: sm_90 has a copy engine, and shared memory for four blocks of the decode kernel. Before that there is room for
// two on many a card, and registers need not be saved for a fourth. The host sees the newer.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kSm90 = false;
#else
constexpr bool kSm90 = true;
#endif

// All of a block's shared memory; the copy engine swizzles by address, in tiles of at most 1 KB.
constexpr int kSwizzleBytes = 1024;
extern __shared__ __align__(kSwizzleBytes) uint8_t shared_memory[];
__device__ __forceinline__ uint32_t shared_base() { return shared_address(shared_memory); }

template <int kAt, int kRows>
struct RowInfo;

// K, V: codecs. MaxRows: query rows that share a pass over the keys: 16 (decode; most blocks a multiprocessor), or 64
// (drafts, large query groups, prefill; 32 for twice the channels).
template <class K, class V, int D, int MaxRows, bool Sm90 = kSm90>
struct Shape {
  static constexpr int kMaxRows = MaxRows;
  static constexpr bool kVInteger = V::kInteger;
  static constexpr bool kDecode = MaxRows == kWideRows;
  static constexpr int kSlices = D / 32;  // of 32 channels
  static constexpr int kKRow = row_bytes(K::kBits, D), kVRow = row_bytes(V::kBits, D);
  static constexpr int kRow = kKRow > kVRow ? kKRow : kVRow;
  using KSwizzle = Swizzle<kKRow / 16>;
  using VSwizzle = Swizzle<kVRow / 16>;

  // Whether the copy engine fills the slots.
  static constexpr bool kWholeRows = KSwizzle::kTiles && VSwizzle::kTiles;
  static constexpr bool kTiles = Sm90 && kWholeRows;

  // The queue of tokens on their way from memory: slots of K codes with the scales of K and V, or of V codes. Slots of 16 KB where
  // a chunk has as many tokens: fewer barriers.
  static constexpr bool kIntegers = K::kInteger && V::kInteger;
  static constexpr int kStageTokens = !kDecode || !kIntegers || kRow > 128 ? 64 : kRow > 64 ? 128 : 256;
  static constexpr int kStageBytes = kStageTokens * kRow;
  static constexpr int kMetaBytes = kStageTokens * 4;
  static constexpr int kSlotUsed = kStageBytes + (K::kInteger ? kMetaBytes : 0) + (V::kInteger ? kMetaBytes : 0);
  static constexpr int kSlotBytes = (kSlotUsed + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes;
  static constexpr int kKMeta = kStageBytes, kVMeta = kStageBytes + (K::kInteger ? kMetaBytes : 0);
  static constexpr int kQueueBytes = !kDecode ? 64 << 10 : kIntegers || !kWholeRows ? 48 << 10 : 32 << 10;
  static constexpr int kFit = kQueueBytes / kSlotBytes;
  static constexpr int kStages = kFit < 2 ? 2 : kFit > 10 ? 10 : kFit;

  // Queries as fragments read them, 16-bit numbers. Narrow tiles, B fragments: [row][D / 32][t][8]; against bank conflicts,
  // where a row is a multiple of 128 bytes, odd rows have slices swapped in pairs. Wide tiles, A fragments of each k-step:
  // [tile of 16 rows][D / 32][k-step][lane][8], numbers in the order k / 8, row / 8, k % 2. `place`: 8 * t + number of a row.
  static constexpr int kQueryRow = 2 * D, kQueryBytes = kMaxRows * kQueryRow;
  __device__ static __forceinline__ int narrow_query(int row, int slice) {
    return kQueryAt + row * kQueryRow + 64 * (D % 64 == 0 ? slice ^ (row & 1) : slice);
  }
  __device__ static __forceinline__ int wide_query(int tile, int slice, int step) {
    return kQueryAt + tile * (16 * kQueryRow) + slice * 1024 + step * 512;
  }
  __device__ static __forceinline__ int query_number(bool wide, int row, int slice, int place) {
    if (!wide) return narrow_query(row, slice) + 2 * place;
    return wide_query(row / 16, slice, place % 8 / 4) + (row % 8 * 4 + place / 8) * 16 + place % 4 / 2 * 8 +
           row / 8 % 2 * 4 + place % 2 * 2;
  }
  // Narrow tiles, behind their queries: weights [token][query row], 16 bits.
  static constexpr int kWeightBytes = kNarrowBlock * kNarrowRows * 2;
  static constexpr int kNarrowBytes = kNarrowRows * kQueryRow + kWeightBytes;
  // Blocks of 64 tokens that wide tiles score together, where a slot has as many: fewer barriers.
  static constexpr int kWideBlocks = kStageTokens > kWideBlock ? 2 : 1;
  static constexpr int kWideStep = kWideBlocks * kWideBlock;
  // Wide tiles whose rows warps share, behind their queries: weights as A fragments [block][tile of 16 rows][k-step][lane][8],
  // and what V's scales make of them, [block][warp][16 rows][2] fp32.
  static constexpr int kWideWeightBytes = kWideBlock * kWideRows * 2;
  static constexpr int kWideSumBytes = V::kInteger ? kWideBlocks * kWarps * kWideRows * 8 : 0;
  template <int kTiles>
  __device__ static __forceinline__ int wide_weights() {
    return kQueryAt + kTiles * kWideRows * kQueryRow;
  }
  template <int kTiles>
  __device__ static __forceinline__ int wide_sums() {
    return wide_weights<kTiles>() + kWideBlocks * kTiles * kWideWeightBytes;
  }
  static constexpr int kSharedTiles = kDecode ? 1 : 2;  // the most that warps share
  static constexpr int kWideBytes =
      kSharedTiles * (kWideRows * kQueryRow + kWideBlocks * kWideWeightBytes) + kWideSumBytes;
  // Outputs on their way to memory, 8 rows of each tile [row][D] fp32, take the place of queries and weights.
  static constexpr int kOutBytes = (kMaxRows / kWideRows) * 8 * D * 4;
  static constexpr int larger(int a, int b) { return a > b ? a : b; }

  static constexpr int kQueryAt = kStages * kSlotBytes;
  static constexpr int kOutAt = kQueryAt;
  static constexpr int kWeightAt = kQueryAt + kNarrowRows * kQueryRow;
  // Rows of a tile that was cut, each warp's: factors, and some partials; see join.cuh.
  static constexpr int kJoinTurn = D == 96 ? 2 : 4, kJoinBytes = kDecode ? kWarps * (512 + kJoinTurn * 4 * D) : 0;
  // What stays for all of a block's items: parameters of its kv head, [4][D] fp32, of K and of V; where there is room.
  static constexpr bool kKeepsParams = Sm90;
  static constexpr int kParamBytes = kKeepsParams ? 4 * 4 * D : 0;
  static constexpr int kKParamsAt =
      kQueryAt + larger(larger(larger(kQueryBytes, kOutBytes), larger(kNarrowBytes, kWideBytes)), kJoinBytes);
  static constexpr int kVParamsAt = kKParamsAt + (K::kInteger ? kParamBytes : 0);
  // Query rows of the item that comes next, as they are in memory; where there is room.
  static constexpr bool kCopiesRows = kTiles && D != 96;
  static constexpr int kNextAt = kVParamsAt + (V::kInteger ? kParamBytes : 0);
  static constexpr int kRowsAt = kNextAt + (kCopiesRows ? kNarrowRows * kQueryRow : 0);
  using Rows = RowInfo<kRowsAt, kMaxRows>;
  static constexpr int kCursorAt = kRowsAt + Rows::kBytes;
  static constexpr int kCursorBytes = 96, kPassBytes = 288;
  static constexpr int kPassAt = kCursorAt + kWarps * kCursorBytes;
  static constexpr int kHeadAt = kPassAt + kPassBytes, kSharedBytes = kHeadAt + 4;
  // Where the copy engine fills slots, cursors are smaller, and the slots' barriers have the rest of their place.
  static constexpr int kTileCursorBytes = 64, kBarrierAt = kCursorAt + kWarps * kTileCursorBytes;
  static_assert(8 * kStages <= kWarps * (kCursorBytes - kTileCursorBytes) && kBarrierAt % 8 == 0, "room for them");

  // The block's kv head, which attend_kernel writes.
  __device__ static __forceinline__ int& kv_head() { return *reinterpret_cast<int*>(shared_memory + kHeadAt); }

  // A multiprocessor of sm_90 shares 227 KB among its blocks, each 1 KB less.
  static constexpr int kBlocksPerSm = !kDecode                   ? (kSharedBytes <= 113 << 10 ? 2 : 1)
                                      : D > 128                  ? 2
                                      : D == 64 && kKRow > kVRow ? 3  // two kinds of copies take registers
                                      : kSharedBytes <= 56 << 10 ? (Sm90 ? 4 : 3)
                                      : kSharedBytes <= 74 << 10 ? 3
                                                                 : 2;

  static_assert(kSharedBytes <= 227 << 10, "shared memory of a block");
};

// What is known of each query row of a pass, arrays [kRows] in shared memory at kAt; and what warps tell each other.
template <int kAt, int kRows>
struct RowInfo {
  template <class T, int kIndex>
  __device__ static __forceinline__ T* array() {
    return reinterpret_cast<T*>(shared_memory + kAt + kIndex * kRows * 4);
  }
  template <class T, int kIndex>
  __device__ static __forceinline__ T* narrow() {
    return reinterpret_cast<T*>(shared_memory + kAt + (8 * kRows + kIndex * kNarrowRows) * 4);
  }
  // logit * log2(e) = dot * factor + base, and the sum of the row's numbers; see queries.cuh
  __device__ static float* base() { return array<float, 0>(); }
  __device__ static float* factor() { return array<float, 1>(); }
  __device__ static float* sum() { return array<float, 2>(); }
  // keys that the row sees
  __device__ static int* key_begin() { return array<int, 3>(); }
  __device__ static int* key_end() { return array<int, 4>(); }
  // token in the tile, query head
  __device__ static int* token() { return array<int, 5>(); }
  __device__ static int* head() { return array<int, 6>(); }
  // NaN where the query is not finite, otherwise 0
  __device__ static float* bad() { return array<float, 7>(); }
  // [kWarps][kNarrowRows]: a warp's largest logit; its weights, and what the codes' zeros take off. Wide tiles have their logits
  // in the place of both.
  __device__ static float* warp_max() { return narrow<float, 0>(); }
  __device__ static float2* warp_sum() { return narrow<float2, kWarps>(); }
  // [kWarps][kWideRows]: maximum and total of a run of chunks, each warp's own
  __device__ static float2* run_state() { return narrow<float2, 4 * kWarps>(); }
  static constexpr int kBytes = (8 * kRows + 8 * kWarps * kNarrowRows) * 4;
};

// An item of the plan; all loads at once.
__device__ __forceinline__ WorkItem load_item(const WorkItem* item) {
  WorkItem now;
  auto* to = reinterpret_cast<uint4*>(&now);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(now) / 16); ++i) {
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[i].x), "=r"(to[i].y), "=r"(to[i].z), "=r"(to[i].w)
                 : "l"(reinterpret_cast<const uint4*>(item) + i));
  }
  return now;
}

// One pass over the keys for up to max_rows query rows of an item.
struct Pass {
  int tiles;                  // 0: a narrow one; otherwise of 16 query rows: 1, 2 or 4
  int low, high;              // keys that any row sees
  int whole_begin, whole_end; // keys that every row sees
  int begin, end;             // tokens to go through; begin is a multiple of `block`
  int block;                  // tokens of a step

  // wide_step: S::kWideStep.
  Pass() = default;
  __device__ Pass(const WorkItem& item, int group, int first_row, int max_rows, int wide_step, int window_left) {
    tiles = tiles_of(item, group, min(item.q_count * group - first_row, max_rows));
    low = visible_keys(item.position, item.start, window_left).begin;
    high = item.position + item.q_count;
    high = high < item.seq_len ? high : item.seq_len;
    whole_begin = visible_keys(item.position + item.q_count - 1, item.start, window_left).begin;
    whole_end = item.position + 1 < item.seq_len ? item.position + 1 : item.seq_len;
    const int first = item.chunk_begin * kChunkSize, last = item.chunk_end * kChunkSize;
    block = tiles == 0 ? kNarrowBlock : wide_step;
    begin = low & -block;  // a power of 2
    begin = begin > first ? begin : first;
    end = high < last ? high : last;
  }
  // Of `rows` query rows of an item. All of a sequence's are of a kind.
  __device__ static int tiles_of(const WorkItem& item, int group, int rows) {
    const int q_len = item.seq_len - item.position + item.q_begin;
    return q_len * group <= kNarrowRows ? 0 : rows <= kWideRows ? 1 : rows <= 2 * kWideRows ? 2 : 4;
  }
};

}  // namespace foldkv::cuda
