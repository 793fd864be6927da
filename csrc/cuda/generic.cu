// Attention for any pair of formats and any head_dim, without tensor cores and without a work list: one warp a query row,
// over all its keys in order, in fp32. It serves what has no kernel of its own (fp32 caches, floats mixed with codes, odd
// head dims); right, and slow. It needs no plan, and a row's bits depend on its own sequence alone.
#include "cuda/generic.h"

#include "core/schedule.h"
#include "cuda/finish.cuh"

namespace foldkv::cuda {
namespace {

constexpr int kMaxEach = kMaxHeadDim / 32;  // channels of a lane

struct Row {
  float q[kMaxHeadDim];  // the query, transformed as K is; static scale folded in
  float zero[kMaxHeadDim];  // of K: static zeros; then room for the output
};

__device__ __forceinline__ float element(const uint8_t* row, int codec, int c) {
  switch (codec) {
    case 0: return reinterpret_cast<const float*>(row)[c];
    case 1: return __half2float(reinterpret_cast<const __half*>(row)[c]);
    case 2: return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(row)[c]);
    case 3: return static_cast<float>(row[c]);
    default: return static_cast<float>(row[c / 2] >> (c % 2 * 4) & 15);
  }
}

__device__ __forceinline__ int bits_of(int codec) { return codec == 0 ? 32 : codec <= 2 ? 16 : codec == 3 ? 8 : 4; }
__device__ __forceinline__ bool is_integer(int codec) { return codec >= 3; }

struct TokenScale {
  float scale, zero;
};

__device__ __forceinline__ TokenScale token_scale(const AttendParams& p, const Cache& cache, int64_t page, int head,
                                                  int offset) {
  const Format& f = cache.format;
  const float mid = static_cast<float>(1 << (bits_of(f.codec) - 1));
  if (!f.dynamic) return {1.0f, 0.0f};
  const uint8_t* at = cache.meta + token_offset(page, head, offset, p.h_kv, p.page_size, f.meta_bytes());
  const float scale = __uint_as_float(static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(at)) << 16);
  return {scale, f.stored_zero ? __half2float(*reinterpret_cast<const __half*>(at + 2)) : mid};
}

// Orthonormal Hadamard of a row in shared memory, by one warp.
__device__ void rotate(float* x, int d, int lane) {
  const int block = hadamard_block(d);
  for (int step = 1; step < block; step *= 2) {
    __syncwarp();
    float next[kMaxEach];
#pragma unroll
    for (int i = 0; i < kMaxEach; ++i) {
      const int c = lane + 32 * i;
      if (c < d) next[i] = (c & step) != 0 ? x[c - step] - x[c] : x[c] + x[c + step];
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kMaxEach; ++i) {
      if (lane + 32 * i < d) x[lane + 32 * i] = next[i];
    }
  }
  __syncwarp();
  const float norm = static_cast<float>(1.0 / sqrt(static_cast<double>(block)));
  for (int c = lane; c < d; c += 32) x[c] *= norm;
  __syncwarp();
}

// Fills row.q and row.zero; returns what is added to every logit, before the softmax scale. `bad`: not finite.
__device__ float prepare(const AttendParams& p, Row& row, int64_t q_at, int kv_head, int lane, bool& bad) {
  const Format& f = p.k_cache.format;
  const float* params = p.k_cache.params + static_cast<int64_t>(kv_head) * p.d;
  const int64_t stride = static_cast<int64_t>(p.h_kv) * p.d;
  bad = false;
  float base = 0.0f;
  for (int c = lane; c < p.d; c += 32) {
    float q = load_element(p.q.data, p.q.dtype, q_at + c);
    bad = bad || !isfinite(q);
    row.zero[c] = 0.0f;
    if (is_integer(f.codec)) {
      base += q * params[kMean * stride + c];
      q *= params[kBalance * stride + c];
    }
    row.q[c] = q;
  }
  bad = __any_sync(kFullWarp, bad);
  if (f.rotate) rotate(row.q, p.d, lane);
  if (is_integer(f.codec) && !f.dynamic) {
    for (int c = lane; c < p.d; c += 32) {
      row.q[c] *= params[kScale * stride + c];
      row.zero[c] = params[kZero * stride + c];
    }
  }
  __syncwarp();
  return warp_sum(base);
}

// Undo V's transform, weigh in the sink, normalise, write.
__device__ void finish(const AttendParams& p, float* x, int row, int head, int kv_head, float max, float total,
                       bool bad, int lane) {
  const Format& f = p.v_cache.format;
  const float* params = p.v_cache.params + static_cast<int64_t>(kv_head) * p.d;
  const int64_t stride = static_cast<int64_t>(p.h_kv) * p.d;
  if (is_integer(f.codec)) {
    if (!f.dynamic) {
      for (int c = lane; c < p.d; c += 32) x[c] *= params[kScale * stride + c];
    }
    if (f.rotate) rotate(x, p.d, lane);
    for (int c = lane; c < p.d; c += 32)
      x[c] = x[c] * params[kBalance * stride + c] + params[kMean * stride + c] * total;
  }
  float scale = 1.0f;
  if (p.sinks != nullptr) {
    const float sink = p.sinks[head], top = fmaxf(max, sink);
    scale = expf(max - top);
    total = total * scale + expf(sink - top);
    max = top;
  }
  const int64_t at = static_cast<int64_t>(row) * p.h_q + head;
  const bool empty = max == -INFINITY;
  for (int c = lane; c < p.d; c += 32) {
    const float out = bad ? NAN : empty ? 0.0f : x[c] * scale / total;
    store_element(p.out, p.q.dtype, at * p.d + c, out);
  }
  if (p.lse != nullptr && lane == 0) p.lse[at] = bad ? NAN : empty ? -INFINITY : max + logf(total);
}

__device__ void attend_row(const AttendParams& p, Row& shared, int row, int head, int lane) {
  const int kv_head = head / (p.h_q / p.h_kv);
  int seq = 0;  // the last sequence that begins at or before the row
  for (int low = 0, high = p.batch - 1; low <= high;) {
    const int middle = (low + high) / 2;
    if (p.cu_seqlens_q[middle] <= row) {
      seq = middle;
      low = middle + 1;
    } else {
      high = middle - 1;
    }
  }
  const int seq_len = p.seq_lens[seq], position = seq_len - (p.cu_seqlens_q[seq + 1] - row);
  KeyRange keys = visible_keys(position, p.seq_starts != nullptr ? p.seq_starts[seq] : 0, p.window_left);
  keys.end = min(keys.end, seq_len);
  bool bad = false;
  const float base = prepare(p, shared, row * p.q.token_stride + head * p.q.head_stride, kv_head, lane, bad);
  const int32_t* table = p.block_table + seq * p.table_stride;
  const int k_row = row_bytes(bits_of(p.k_cache.format.codec), p.d),
            v_row = row_bytes(bits_of(p.v_cache.format.codec), p.d);
  const float* v_zero = p.v_cache.params + (static_cast<int64_t>(kZero) * p.h_kv + kv_head) * p.d;
  const bool v_static = is_integer(p.v_cache.format.codec) && !p.v_cache.format.dynamic;
  float x[kMaxEach] = {}, max = -INFINITY, total = 0.0f;
  for (int begin = keys.begin; begin < keys.end; begin += 32) {
    const int key = begin + lane, count = min(32, keys.end - begin);
    const bool mine = lane < count;
    const int64_t page = mine ? min(static_cast<uint32_t>(table[key / p.page_size]), p.max_page) : 0;
    float logit = -INFINITY;
    TokenScale v_scale = {0.0f, 0.0f};
    if (mine) {
      const uint8_t* codes =
          p.k_cache.codes + token_offset(page, kv_head, key % p.page_size, p.h_kv, p.page_size, k_row);
      const TokenScale k_scale = token_scale(p, p.k_cache, page, kv_head, key % p.page_size);
      float dot = 0.0f;
      for (int c = 0; c < p.d; ++c) {
        dot = fmaf(shared.q[c], element(codes, p.k_cache.format.codec, c) - shared.zero[c] - k_scale.zero, dot);
      }
      logit = (dot * k_scale.scale + base) * p.softmax_scale;
      if (p.softcap > 0.0f) logit = p.softcap * tanhf(logit / p.softcap);
      v_scale = token_scale(p, p.v_cache, page, kv_head, key % p.page_size);
    }
    const float top = fmaxf(max, warp_max(logit)), scale = max == -INFINITY ? 0.0f : expf(max - top);
    const float weight = mine ? expf(logit - top) : 0.0f;
    total = total * scale + warp_sum(weight);
    max = top;
#pragma unroll
    for (int i = 0; i < kMaxEach; ++i) x[i] *= scale;
    for (int t = 0; t < count; ++t) {
      const float w = __shfl_sync(kFullWarp, weight * v_scale.scale, t), zero = __shfl_sync(kFullWarp, v_scale.zero, t);
      const int64_t at = __shfl_sync(kFullWarp, page, t);
      const uint8_t* codes =
          p.v_cache.codes + token_offset(at, kv_head, (begin + t) % p.page_size, p.h_kv, p.page_size, v_row);
#pragma unroll
      for (int i = 0; i < kMaxEach; ++i) {
        const int c = lane + 32 * i;
        if (c < p.d) x[i] = fmaf(w, element(codes, p.v_cache.format.codec, c) - (v_static ? v_zero[c] : zero), x[i]);
      }
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kMaxEach; ++i) {
    if (lane + 32 * i < p.d) shared.zero[lane + 32 * i] = x[i];
  }
  __syncwarp();
  finish(p, shared.zero, row, head, kv_head, max, total, bad, lane);
  __syncwarp();
}

__global__ void __launch_bounds__(kThreads) generic_kernel(const __grid_constant__ AttendParams p) {
  __shared__ Row rows[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t jobs = static_cast<int64_t>(p.num_rows) * p.h_q;
  const int used = p.cu_seqlens_q[p.batch];
  for (int64_t job = static_cast<int64_t>(blockIdx.x) * kWarps + warp; job < jobs;
       job += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int row = static_cast<int>(job / p.h_q), head = static_cast<int>(job % p.h_q);
    if (row < used) {
      attend_row(p, rows[warp], row, head, lane);
    } else {
      for (int c = lane; c < p.d; c += 32) store_element(p.out, p.q.dtype, job * p.d + c, 0.0f);
      if (p.lse != nullptr && lane == 0) p.lse[job] = -INFINITY;
    }
  }
}

}  // namespace

cudaError_t generic_attention(const AttendParams& p, int num_sms, cudaStream_t stream) {
  generic_kernel<<<4 * num_sms, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace foldkv::cuda
