// Sizes of the attention kernel, and where things lie in its shared memory.
#pragma once

#include "core/schedule.h"
#include "cuda/ptx.cuh"

namespace foldkv::cuda {

constexpr int kThreads = 128, kWarps = 4;
constexpr int kEmpty = -(1 << 29);  // the running maximum, an integer power of 2, of a state that has seen nothing

// Rows of kUnits units of 16 bytes, placed so that 8 rows read at the same unit come from different banks.
template <int kUnits>
struct Swizzle {
  static constexpr int kLog = kUnits % 8 == 0 ? 3 : kUnits % 4 == 0 ? 2 : kUnits % 2 == 0 ? 1 : 0;
  // What the unit's index is xor-ed with.
  __device__ static __forceinline__ int of(int row) { return (row >> (3 - kLog)) & ((1 << kLog) - 1); }
};

// Tokens that a block scores before it weighs values. A sequence whose query rows fit one tile of 8 has its whole chunk
// at once, and sums in two chains; with more rows it has 64 tokens and one chain, however many tiles share the pass. So a
// row's bits depend on how many rows its own sequence has, not on which kernel serves it.
constexpr int kNarrowBlock = 256, kWideBlock = 64;

// Blocks of the decode kernel that a multiprocessor holds; before sm_90 there is shared memory for no more than two, and
// registers need not be saved for a fourth.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kMostBlocks = 3;
#else
constexpr int kMostBlocks = 4;
#endif

// K, V: codecs. kMaxTiles: of 8 query rows that share a pass: 1 (decode; most blocks a multiprocessor), 4 (speculative
// decode, large query groups; 2 for twice the channels) or 8 (prefill).
template <class K, class V, int D, int MaxTiles>
struct Shape {
  static constexpr int kMaxTiles = MaxTiles, kMaxRows = 8 * kMaxTiles;
  static constexpr bool kWide = kMaxTiles > 1;  // running sums live in shared memory
  static constexpr int kKRow = row_bytes(K::kBits, D), kVRow = row_bytes(V::kBits, D);
  static constexpr int kRow = kKRow > kVRow ? kKRow : kVRow;

  // The queue of tokens on their way from memory: slots of K codes with the scales of K and V, or of V codes.
  static constexpr int kStageTokens = kMaxTiles == 1 && kRow <= 64 && kRow % 32 == 0 && kKRow == kVRow ? 128 : 64;
  static constexpr int kStageBytes = kStageTokens * kRow;
  static constexpr int kMetaBytes = kStageTokens * 4;
  static constexpr int kSlotBytes = kStageBytes + (K::kInteger ? kMetaBytes : 0) + (V::kInteger ? kMetaBytes : 0);
  static constexpr int kKMeta = kStageBytes, kVMeta = kStageBytes + (K::kInteger ? kMetaBytes : 0);
  static constexpr int kQueueBytes = kMaxTiles == 1 ? 48 << 10 : kMaxTiles < 8 ? 60 << 10 : 36 << 10;
  static constexpr int kFit = kQueueBytes / kSlotBytes;
  static constexpr int kLeast = kMaxTiles < 8 ? 3 : 2;  // prefill has more to compute than to fetch
  static constexpr int kStages = kFit < kLeast ? kLeast : kFit > 10 ? 10 : kFit;

  // Slots that are waited for, and filled again, together: fewer barriers, and fewer copies of the code that fills them.
  static constexpr int kTogether = kMaxTiles == 1 && kStages >= 5 ? 2 : 1;

  // Queries as B fragments read them: [row][D / 32][t][8] 16-bit numbers. Against bank conflicts, where a row is a multiple
  // of 128 bytes, wide tiles have rows padded, and narrow ones, which lack the room, odd rows with slices swapped in pairs.
  static constexpr int kQueryRow = 2 * D + (kWide && D % 64 == 0 ? 64 : 0);
  static constexpr int kQueryBytes = kMaxRows * kQueryRow;
  __device__ static __forceinline__ int query_at(int row, int slice) {
    return kQueryAt + row * kQueryRow + 64 * (!kWide && D % 64 == 0 ? slice ^ (row & 1) : slice);
  }
  // Weights [token][query row], 16 bits.
  static constexpr int kWeightBytes = kMaxTiles == 8 ? 8 << 10 : 4 << 10;
  // Outputs of finished rows [row][D] fp32 take the place of queries and weights. Wide tiles keep their running sums in
  // shared memory, each thread its own; there the outputs take the place of those.
  static constexpr int kOutBytes = kMaxRows * D * 4;
  static constexpr int kWorkBytes =
      kWide || kOutBytes < kQueryBytes + kWeightBytes ? kQueryBytes + kWeightBytes : kOutBytes;
  static constexpr int kRunBytes = kWide ? kOutBytes : 0;

  static constexpr int kQueueAt = 0;
  static constexpr int kQueryAt = kStages * kSlotBytes;
  static constexpr int kWeightAt = kQueryAt + kQueryBytes;
  static constexpr int kOutAt = kWide ? kQueryAt + kWorkBytes : kQueryAt;
  static constexpr int kRowsAt = kQueryAt + kWorkBytes + kRunBytes;
  static constexpr int kRowsBytes = kMaxRows * (9 + 8 * kWarps) * 4;
  static constexpr int kCursorAt = kRowsAt + kRowsBytes;
  static constexpr int kPassAt = kCursorAt + kWarps * 80;
  static constexpr int kSharedBytes = kPassAt + 64;

  static constexpr int kBlocksPerSm = kMaxTiles > 1              ? (kSharedBytes <= 113 << 10 ? 2 : 1)
                                      : D > 128                  ? 2
                                      : kSharedBytes <= 57088    ? kMostBlocks
                                      : kSharedBytes <= 74 << 10 ? 3
                                                                 : 2;

  static_assert(kSharedBytes <= 227 << 10, "shared memory of a block");
};

// All of a block's shared memory.
extern __shared__ __align__(128) uint8_t shared_memory[];

// What is known of each query row of a tile, arrays [kRows] in shared memory at kAt.
template <int kAt, int kRows>
struct RowInfo {
  template <class T, int kIndex>
  __device__ static __forceinline__ T* array() {
    return reinterpret_cast<T*>(shared_memory + kAt + kIndex * kRows * 4);
  }
  // logit * log2(e) = dot * factor + base, and more; see load_queries
  __device__ static float* base() { return array<float, 0>(); }
  __device__ static float* factor() { return array<float, 1>(); }
  __device__ static float* sum() { return array<float, 2>(); }
  __device__ static float* correction() { return array<float, 3>(); }
  // keys that the row sees
  __device__ static int* key_begin() { return array<int, 4>(); }
  __device__ static int* key_end() { return array<int, 5>(); }
  // token in the tile, query head
  __device__ static int* token() { return array<int, 6>(); }
  __device__ static int* head() { return array<int, 7>(); }
  // NaN where the query is not finite, otherwise 0
  __device__ static float* bad() { return array<float, 8>(); }
  // [kWarps][kRows]: a warp's largest logit; its weights, and what the codes' zeros take off
  __device__ static float* warp_max() { return array<float, 9>(); }
  __device__ static float2* warp_sum() { return array<float2, 9 + kWarps>(); }
  // [kWarps][kRows], each warp its own, all alike: the softmax state of a chunk, and of a run of chunks
  __device__ static int* chunk_max() { return array<int, 9 + 3 * kWarps>(); }
  __device__ static float* chunk_total() { return array<float, 9 + 4 * kWarps>(); }
  __device__ static float* chunk_zeros() { return array<float, 9 + 5 * kWarps>(); }
  __device__ static int* run_max() { return array<int, 9 + 6 * kWarps>(); }
  __device__ static float* run_total() { return array<float, 9 + 7 * kWarps>(); }
  static constexpr int kBytes = (9 + 8 * kWarps) * kRows * 4;
};

// One pass over the keys for up to kMaxRows query rows of an item.
struct Pass {
  int tiles;                  // of 8 query rows: 1, 2, 4 or 8
  int low, high;              // keys that any row sees
  int whole_begin, whole_end; // keys that every row sees
  int block;                  // kNarrowBlock or kWideBlock
  int begin, end;             // tokens to go through; begin is a multiple of block

  __device__ Pass(const WorkItem& item, int group, int first_row, int max_tiles, int window_left) {
    const int rows_left = item.q_count * group - first_row, q_len = item.seq_len - item.position + item.q_begin;
    block = q_len * group <= 8 ? kNarrowBlock : kWideBlock;
    tiles = rows_left <= 8 ? 1 : rows_left <= 16 ? 2 : rows_left <= 32 ? 4 : 8;
    tiles = tiles < max_tiles ? tiles : max_tiles;
    low = visible_keys(item.position, item.start, window_left).begin;
    high = item.position + item.q_count;
    high = high < item.seq_len ? high : item.seq_len;
    whole_begin = visible_keys(item.position + item.q_count - 1, item.start, window_left).begin;
    whole_end = item.position + 1 < item.seq_len ? item.position + 1 : item.seq_len;
    const int first = item.chunk_begin * kChunkSize, last = item.chunk_end * kChunkSize;
    begin = low / block * block;
    begin = begin > first ? begin : first;
    end = high < last ? high : last;
  }
};

}  // namespace foldkv::cuda
