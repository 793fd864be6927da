// Append on a GPU: RoPE, mean, balance, rotation, quantise, pack and page write in one launch. The definition is
// quant/reference.py, the bytes are those of csrc/cpu/append.h; so each float operation rounds once, by intrinsics that the
// compiler does not contract.
//
// A row (one token of one head of K or V) lies in G lanes of a warp, V channels in each, so 32 / G rows are in flight at a
// time and packing needs no exchange. The rows of a warp share the head, and with it params.
#include <cmath>
#include <cstdint>

#include "core/params.h"
#include "cuda/launch.h"
#include "cuda/overlap.cuh"
#include "cuda/row_codes.cuh"
#include "cuda/row_store.cuh"
#include "cuda/row_turns.cuh"
#include "cuda/rows.cuh"
#include "cuda/shaping.cuh"
#include "cuda/steering.cuh"

namespace foldkv::cuda {
namespace {

template <int G, bool Shapes>
constexpr int kWarps = Shapes ? ShapeLayout<G>::kWarps : 4;
// Row blocks that a block works through where there are many, and what is many: blocks that keep any GPU full for some rounds.
// Where a matrix of more than 128 channels is fetched first, one round.
template <int G, bool Shapes>
constexpr int kMaxPasses = Shapes && G == 32 ? 8 : 4;
template <int G, bool Shapes>
constexpr int64_t kManyBlocks = Shapes && G == 32 ? 256 : 4096;

// K or V of a launch.
struct Side {
  Rows rows;
  Cache cache;
  int bits;
  bool integer;
  CodeRange range;
  bool vectors;  // rows are 16-byte aligned
};

struct Launch {
  Side side[2];
  const int64_t* slots;
  const int64_t* positions;
  Rope rope;  // K only
  int64_t* nonfinite;
  int64_t num_slots, max_pos;
  int num_tokens, h_kv, d, page_shift;
  float norm;  // of the rotation: 1 / sqrt(block)
};

// Blocks that share a multiprocessor.
template <int V, int G, bool Steers, bool Shapes>
constexpr int kBlocks = Shapes   ? (G == 32  ? 2
                                    : Steers ? 4
                                             : 6)
                        : V == 8 ? (Steers ? 5 : 8)
                                 : (Steers ? 3 : 4);

// Block (x, y): head x / 2, K or V by x % 2; tokens of kBlockRows rows at a time.
// Steers: a side is static and of kSteerBits. Shapes: a side has a matrix to shape its rows by.
template <int V, int G, bool Steers, bool Shapes>
__global__ void __launch_bounds__(kWarps<G, Shapes> * 32, kBlocks<V, G, Steers, Shapes>)
    append_kernel(const __grid_constant__ Launch p) {
  wait_for_previous();
  let_next_begin();
  constexpr unsigned kBlockRows = kWarps<G, Shapes> * 32 / G;
  const int lane = threadIdx.x % 32, head = blockIdx.x / 2;
  const bool is_k = blockIdx.x % 2 == 0;
  const Side& side = p.side[blockIdx.x % 2];
  const Format format = side.cache.format;
  const DType dtype = side.rows.dtype;
  const int c0 = lane % G * V;
  const bool active = c0 < p.d, ropes = is_k && p.rope.cos != nullptr;

  const int8_t* matrix = nullptr;
  bool shaped = false;
  if (Shapes && side.cache.shaping != nullptr) {
    matrix = side.cache.shaping + int64_t{head} * p.d * p.d;
    shaped = __ldg(matrix) != 0;
  }

  // Static formats: zero and scale. Dynamic ones: mean and balance, which are often 0 and 1 and then are left out. Read
  // anew for each row, from the first cache, as registers are worth more.
  const auto load_param = [&](ParamRow which, float (&into)[V]) {
    if (active) load_floats(side.cache.params + (int64_t{which} * p.h_kv + head) * p.d + c0, into);
  };
  bool centred = false, divides = side.integer;
  if (side.integer && format.dynamic) {
    float mean[V] = {}, balance[V];
#pragma unroll
    for (int i = 0; i < V; ++i) balance[i] = 1.0f;
    load_param(kMean, mean);
    load_param(kBalance, balance);
    bool has_mean = false, has_balance = false;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      has_mean = has_mean || mean[i] != 0.0f;
      has_balance = has_balance || balance[i] != 1.0f;
    }
    centred = __any_sync(kFullWarp, has_mean);
    divides = __any_sync(kFullWarp, has_balance);
  }

  bool steered = false;
  if constexpr (Steers) {
    float direction[V] = {};
    if (side.integer && !format.dynamic && side.bits == kSteerBits) load_param(kQuery, direction);
    steered = __any_sync(kFullWarp, is_direction(direction));
  }

  // Rows are read one round ahead; a row without a valid slot is read and then dropped, so that no load waits for another.
  const unsigned num_tokens = p.num_tokens, stride = gridDim.y * kBlockRows;
  unsigned token = blockIdx.y * kBlockRows + threadIdx.x / G;
  uint32_t raw[V] = {};
  int64_t slot = -1, position = 0;
  const auto fetch = [&] {
    slot = -1;
    if (token >= num_tokens) return;
    slot = p.slots[token];
    if (p.rope.cos != nullptr) position = p.positions[token];
    if (active) {
      const int64_t at = token * side.rows.token_stride + head * side.rows.head_stride + c0;
      fetch_elements(side.rows.data, dtype, at, side.vectors, raw);
    }
  };
  fetch();
  uint8_t* const shared = shaping_shared();
  if (shaped) fetch_matrix<G>(shared, matrix, p.d);
  // Where rows are shaped the warps of a block go on together.
  while (token - (Shapes ? threadIdx.x : lane) / G < num_tokens) {
    float x[V];
    widen_elements(raw, dtype, x);
    bool valid = slot >= 0 && slot < p.num_slots;
    if (p.rope.cos != nullptr) valid = valid && position >= 0 && position < p.max_pos;
    const bool any = __any_sync(kFullWarp, valid);
    if (ropes && any) {
      const int64_t at = token * side.rows.token_stride + head * side.rows.head_stride;
      turn_row<V>(p.rope, side.rows, at, position * p.rope.half, c0, lane, valid && active, x);
    }
    const int64_t place = ((slot >> p.page_shift) * p.h_kv + head << p.page_shift) + (slot & ((1 << p.page_shift) - 1));
    token += stride;
    fetch();
    if (!any && !shaped) continue;
    float magnitude = 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) magnitude = max_or_nan(magnitude, fabsf(x[i]));
    const bool extreme = __any_sync(kFullWarp, !(magnitude <= kMaxDynamic));
    if (extreme) repair<V, G>(x, format.dynamic, valid, p.nonfinite);

    uint32_t code[V];
    if (centred) {
      float mean[V] = {};
      load_param(kMean, mean);
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] = __fsub_rn(x[i], mean[i]);
    }
    if (divides) {
      float divisor[V];
#pragma unroll
      for (int i = 0; i < V; ++i) divisor[i] = 1.0f;
      load_param(format.dynamic ? kBalance : kScale, divisor);
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] = __fdiv_rn(x[i], divisor[i]);
    }
    if (side.integer && !format.dynamic) {
      float zero[V] = {};
      load_param(kZero, zero);
#pragma unroll
      for (int i = 0; i < V; ++i) code[i] = code_bits(x[i], zero[i], side.range.top);
      if constexpr (Steers) {
        if (steered) {
          float direction[V] = {};
          load_param(kQuery, direction);
#pragma unroll
          for (int i = 0; i < V; ++i) x[i] = __fadd_rn(x[i], zero[i]);
          steer_row<V, G>(x, direction, c0, active, code);
        }
      }
    } else if (side.integer) {
      if (extreme || centred || divides) {
#pragma unroll
        for (int i = 0; i < V; ++i) x[i] = fminf(fmaxf(x[i], -kMaxDynamic), kMaxDynamic);
      }
      if (format.rotate) rotate<V, G>(x, hadamard_block(p.d), lane, p.norm);
      float low = x[0], high = x[0];
#pragma unroll
      for (int i = 1; i < V; ++i) low = fminf(low, x[i]), high = fmaxf(high, x[i]);
      if (!active) low = INFINITY, high = -INFINITY;
      row_range<G>(low, high);
      const bool searched = is_searched(side.range, low, high);
      ScaleZero row;
      Searched<V> found;
      if (side.range.searches) {
        found = search_row<V, G>(x, low, high, active, code);
        if (!Shapes) row = search_scale<V, G>(found, code);
      }
      if (!searched) row = row_codes(side.range, low, high, x, code);
      if constexpr (Shapes) {
        if (shaped) {
          const bool chosen = valid && active && (searched || !side.range.searches);
          uint32_t error[2];
          const int step = row_errors(side.range, found, x, chosen, code, error);
          int pull[V];
          const uint32_t aside = pull_rows<G>(shared, p.d, error, pull);
          put_aside(aside, found.unit);
          shape_row<G>(shared, p.d, step, (1u << side.bits) - 1, chosen, pull, code);
          take_back(aside, found.unit);
        }
        if (side.range.searches) {
          const ScaleZero by_codes = search_scale<V, G>(found, code);
          if (searched) row = by_codes;
        }
      }
      if (valid && lane % G == 0) {
        const uint32_t scale = __float_as_uint(row.scale) >> 16;
        const uint32_t zero = __half_as_ushort(__float2half_rn(row.zero));
        if (format.stored_zero) {
          reinterpret_cast<uint32_t*>(side.cache.meta)[place] = scale | zero << 16;
        } else {
          reinterpret_cast<uint16_t*>(side.cache.meta)[place] = static_cast<uint16_t>(scale);
        }
      }
    }
    if (!valid || !active) continue;
    store_row(format.codec, side.cache.codes + place * row_bytes(side.bits, p.d) + c0 * side.bits / 8, x, code);
  }
}

Side side_of(const Rows& rows, Cache cache) {
  const int64_t size = rows.dtype == DType::Float32 ? 4 : 2;
  const bool vectors = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.token_stride * size % 16 == 0 &&
                       rows.head_stride * size % 16 == 0;
  const Codec& codec = kCodecs[cache.format.codec];
  const bool integer = codec.kind == Kind::Integer;
  const float top = integer ? static_cast<float>((1 << codec.bits) - 1) : 1.0f;
  const float steps = cache.format.stored_zero || !integer ? top : static_cast<float>((1 << (codec.bits - 1)) - 1);
  const bool searches = cache.format.dynamic && cache.format.stored_zero && codec.bits == kSearchBits;
  // Formats whose rows are shaped, quant.spec.Format.shapes_rounding.
  if (!searches && !(cache.format.dynamic && integer && codec.bits == 8)) cache.shaping = nullptr;
  return {rows, cache, codec.bits, integer, {cache.format.stored_zero, searches, top, steps, 1.0f / steps}, vectors};
}

template <int V, int G, bool Steers, bool Shapes>
int launch_kernel(const Device& device, const Launch& p, cudaStream_t stream) {
  constexpr auto kKernel = append_kernel<V, G, Steers, Shapes>;
  constexpr int kThreads = kWarps<G, Shapes> * 32;
  constexpr int64_t kBlockRows = kThreads / G;
  const int64_t row_blocks = (p.num_tokens + kBlockRows - 1) / kBlockRows;
  int64_t passes = row_blocks * 2 * p.h_kv / kManyBlocks<G, Shapes>;
  passes = passes < 1 ? 1 : passes > kMaxPasses<G, Shapes> ? kMaxPasses<G, Shapes> : passes;
  const int64_t y = (row_blocks + passes - 1) / passes;
  const dim3 grid(2u * p.h_kv, static_cast<unsigned>(y < 65535 ? y : 65535));
  const int shared = Shapes ? ShapeLayout<G>::shared_bytes(p.d) : 0;
  if (shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  return launch_overlapping<kKernel>(device, grid, kThreads, shared, stream, p);
}

template <int V, int G>
int launch(const Device& device, Launch& p, cudaStream_t stream) {
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  Rope& rope = p.rope;
  rope.whole_lanes = rope.half % (rope.interleaved ? V / 2 : V) == 0 && aligned(rope.cos) && aligned(rope.sin);
  bool steers = false, shapes = false;
  for (const Side& side : p.side) {
    steers = steers || (side.integer && !side.cache.format.dynamic && side.bits == kSteerBits);
    shapes = shapes || side.cache.shaping != nullptr;
    if (!aligned(side.cache.shaping)) return cudaErrorMisalignedAddress;
  }
  if constexpr (V == 8) {
    if (shapes && steers) return launch_kernel<V, G, true, true>(device, p, stream);
    if (shapes) return launch_kernel<V, G, false, true>(device, p, stream);
  } else if (shapes) {
    return cudaErrorNotSupported;
  }
  if (steers) return launch_kernel<V, G, true, false>(device, p, stream);
  return launch_kernel<V, G, false, false>(device, p, stream);
}

}  // namespace
}  // namespace foldkv::cuda

extern "C" int foldkv_cuda_append_kv(const foldkv::AppendParams* params, void* stream) {
  using namespace foldkv::cuda;
  const foldkv::AppendParams& p = *params;
  if (p.num_tokens == 0 || p.h_kv == 0) return cudaSuccess;
  Device device;
  if (const cudaError_t error = current_device(device); error != cudaSuccess) return error;
  int page_shift = 0;
  while (1 << page_shift < p.page_size) ++page_shift;
  Launch launched{{side_of(p.k, p.k_cache), side_of(p.v, p.v_cache)},
                  p.slots,
                  p.positions,
                  {p.cos, p.sin, p.rot_half, p.interleaved, false},
                  p.nonfinite,
                  p.num_pages * p.page_size,
                  p.max_pos,
                  p.num_tokens,
                  p.h_kv,
                  p.d,
                  page_shift,
                  static_cast<float>(1.0 / std::sqrt(static_cast<double>(foldkv::hadamard_block(p.d))))};
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.d <= 64) return launch<8, 8>(device, launched, on);
  if (p.d <= 128) return launch<8, 16>(device, launched, on);
  if (p.d <= 256) return launch<8, 32>(device, launched, on);
  return launch<16, 32>(device, launched, on);
}
