// Attention over a run of chunks on the CPU, and the merge of partial results.
//
// A chunk's result does not depend on what else is computed: a fresh softmax state for each chunk, folded left to right
// with the formula that the merge uses. So the plan may cut a sequence anywhere between chunks and the bits stay.
#pragma once

#include "cpu/rows.h"
#include "cpu/tables.h"

namespace foldkv::FOLDKV_ISA {

using cpu::kRows;
using cpu::QueryTile;
using cpu::ValueTile;

constexpr float kEmpty = -INFINITY;  // the maximum of a state that has seen nothing

// Softmax state of one query row: running maximum, sum of weights. Its outputs o [d] lie beside it.
struct State {
  float m = kEmpty, l = 0.0f;
};

// (a, o_a) becomes the state of both.
inline void merge_state(State& a, float* o_a, const State& b, const float* o_b, int d) {
  if (b.m == kEmpty) return;
  if (a.m == kEmpty) {
    a = b;
    std::memcpy(o_a, o_b, d * sizeof(float));
    return;
  }
  const float m = a.m > b.m ? a.m : b.m;
  const float scale_a = exp_nonpositive(a.m - m), scale_b = exp_nonpositive(b.m - m);
  a = {m, a.l * scale_a + b.l * scale_b};
  for (int c = 0; c < d; c += 16) {
    store(o_a + c, load(o_a + c) * splat(scale_a) + load(o_b + c) * splat(scale_b));
  }
}

inline const float* param(const Cache& cache, ParamRow which, int head, const AttendParams& p) {
  return cache.params + (which * p.h_kv + head) * p.d;
}

inline bool is_integer(const Cache& cache) { return kCodecs[cache.format.codec].kind == Kind::Integer; }

// The code that the codecs' sums are taken about.
inline float mid_code(const Cache& cache) { return static_cast<float>(1 << (kCodecs[cache.format.codec].bits - 1)); }

// Undo V's transform, weigh in the sink, normalise, write. `o` is used up.
inline void write_output(const AttendParams& p, int64_t row, int head, State s, float* o) {
  const int d = p.d, kv_head = p.group.divide(head);
  const Cache& v = p.v_cache;
  if (s.m == kEmpty) std::memset(o, 0, d * sizeof(float));
  if (is_integer(v)) {
    if (!v.format.dynamic) {
      const float* scale = param(v, kScale, kv_head, p);
      for (int c = 0; c < d; c += 16) store(o + c, load(o + c) * load(scale + c));
    }
    if (v.format.rotate) hadamard(o, d);
    const float *balance = param(v, kBalance, kv_head, p), *mean = param(v, kMean, kv_head, p);
    for (int c = 0; c < d; c += 16) {
      store(o + c, load(o + c) * load(balance + c) + load(mean + c) * splat(s.l));
    }
  }
  if (p.sinks != nullptr) {
    const float sink = p.sinks[head], m = s.m > sink ? s.m : sink;
    const float scale = exp_nonpositive(s.m - m);
    s = {m, s.l * scale + exp_nonpositive(sink - m)};
    for (int c = 0; c < d; c += 16) store(o + c, load(o + c) * splat(scale));
  }
  const int64_t at = row * p.h_q + head;
  if (s.m != kEmpty) {
    for (int c = 0; c < d; c += 16) store(o + c, load(o + c) / splat(s.l));
  }
  write_row(p.out, p.q.dtype, at * d, o, d);
  if (p.lse != nullptr) p.lse[at] = s.m == kEmpty ? kEmpty : s.m + std::log(s.l);
}

// Where the partial of one query token and head lies.
struct Partial {
  float* ml;
  float* o;
};

inline Partial partial_at(const AttendParams& p, int64_t partial, int head) {
  const int64_t index = partial * p.h_q + head;
  return {p.workspace + index * 2, p.workspace + p.max_partials * p.h_q * 2 + index * p.d};
}

// Bf16 scales, and fp16 zeros, of 16 tokens.
inline void read_meta(const Cache& cache, const uint8_t* meta, F& scale, F& zero) {
  if (!cache.format.stored_zero) {
    scale = load_bf16(reinterpret_cast<const uint16_t*>(meta));
    return;
  }
  uint16_t scales[16], zeros[16];
  for (int t = 0; t < 16; ++t) {
    std::memcpy(&scales[t], meta + 4 * t, 2);
    std::memcpy(&zeros[t], meta + 4 * t + 2, 2);
  }
  scale = load_bf16(scales);
  zero = load_f16(zeros);
}

// The query rows of one block, over all chunks of a work item.
class Block {
 public:
  Block(const AttendParams& p, const cpu::IsaOps& isa, const WorkItem& item, int kv_head, int first_row)
      : p_(p),
        k_(*isa.codecs[p.k_cache.format.codec]),
        v_(*isa.codecs[p.v_cache.format.codec]),
        kv_head_(kv_head),
        table_(p.block_table + item.seq * p.table_stride) {
    const int group = p.group.n;
    const int rows = item.q_count * group - first_row;
    rows_ = query_.rows = value_.rows = rows < kRows ? rows : kRows;
    const int seq_len = p.seq_lens[item.seq], begin = p.cu_seqlens_q[item.seq];
    const int q_len = p.cu_seqlens_q[item.seq + 1] - begin;
    const int start = p.seq_starts != nullptr ? p.seq_starts[item.seq] : 0;
    keys_ = {seq_len, 0};
    for (int r = 0; r < rows_; ++r) {
      token_[r] = (first_row + r) / group;
      head_[r] = kv_head * group + (first_row + r) % group;
      out_row_[r] = begin + item.q_begin + token_[r];
      range_[r] = visible_keys(seq_len - q_len + item.q_begin + token_[r], start, p.window_left);
      if (range_[r].begin >= range_[r].end) continue;
      if (range_[r].begin < keys_.begin) keys_.begin = range_[r].begin;
      if (range_[r].end > keys_.end) keys_.end = range_[r].end;
    }
    prepare_queries();
  }

  void run(const WorkItem& item) {
    for (int chunk = item.chunk_begin; chunk < item.chunk_end; ++chunk) {
      State fresh[kRows];
      attend_chunk(chunk, fresh);
      for (int r = 0; r < rows_; ++r) {
        if (item.folds) {
          merge_state(state_[r], o_[r], fresh[r], chunk_o_[r], p_.d);
        } else {
          save(item.first_partial + (chunk - item.chunk_begin) * item.q_count, r, fresh[r], chunk_o_[r]);
        }
      }
    }
    if (!item.folds) return;
    for (int r = 0; r < rows_; ++r) {
      if (item.first_partial >= 0) {
        save(item.first_partial, r, state_[r], o_[r]);
      } else {
        if (bad_[r]) state_[r] = {NAN, NAN};
        write_output(p_, out_row_[r], head_[r], state_[r], o_[r]);
      }
    }
  }

 private:
  void save(int64_t partial, int r, State s, const float* o) {
    if (bad_[r]) s = {NAN, NAN};
    const Partial to = partial_at(p_, partial + token_[r], head_[r]);
    to.ml[0] = s.m;
    to.ml[1] = s.l;
    if (s.m != kEmpty) std::memcpy(to.o, o, p_.d * sizeof(float));
  }

  // Effective queries, and what is the same for every token: the mean's share and the static zeros' of each logit.
  void prepare_queries() {
    const Cache& k = p_.k_cache;
    for (int r = 0; r < rows_; ++r) {
      float* q = query_.q[r];
      read_row(p_.q, out_row_[r], head_[r], p_.d, q);
      bad_[r] = count_nonfinite(q, p_.d) > 0;
      if (bad_[r]) std::memset(q, 0, p_.d * sizeof(float));
      base_[r] = q_sum_[r] = 0.0f;
      if (!is_integer(k)) continue;
      const float *mean = param(k, kMean, kv_head_, p_), *balance = param(k, kBalance, kv_head_, p_);
      double base = dot(q, mean);
      for (int c = 0; c < p_.d; c += 16) store(q + c, load(q + c) * load(balance + c));
      if (k.format.rotate) hadamard(q, p_.d);
      if (!k.format.dynamic) {
        const float *scale = param(k, kScale, kv_head_, p_), *zero = param(k, kZero, kv_head_, p_);
        for (int c = 0; c < p_.d; c += 16) store(q + c, load(q + c) * load(scale + c));
        for (int c = 0; c < p_.d; ++c) base -= static_cast<double>(q[c]) * (zero[c] - mid_code(k));
      }
      base_[r] = static_cast<float>(base * p_.softmax_scale);
      for (int c = 0; c < p_.d; ++c) q_sum_[r] += q[c];
    }
    k_.prepare(query_, p_.d);
  }

  double dot(const float* a, const float* b) const {
    double sum = 0.0;
    for (int c = 0; c < p_.d; ++c) sum += static_cast<double>(a[c]) * b[c];
    return sum;
  }

  // The page that holds `token`, and where the token's row starts in `cache`.
  const uint8_t* row(const uint8_t* pool, int token, int bytes) const {
    const int64_t page = table_[token / p_.page_size];
    return pool + token_offset(page, kv_head_, token % p_.page_size, p_.h_kv, p_.page_size, bytes);
  }

  // Ask for the rows of `token` and those after it up to the next multiple of 16. Keys and values take turns in being
  // worked on, so while one is computed with, the other is fetched: values of the same tokens, keys of the next chunk.
  void prefetch(const Cache& cache, int token) const {
    if (token >= keys_.end) return;
    const int bytes = row_bytes(kCodecs[cache.format.codec].bits, p_.d);
    const uint8_t* from = row(cache.codes, token, bytes);
    const int length = (16 - token % 16) * bytes;
    for (int i = 0; i < length; i += 64) __builtin_prefetch(from + i, 0, 2);
  }

  void attend_chunk(int chunk, State* fresh) {
    const int first = chunk * kChunkSize;
    const int begin = keys_.begin > first ? keys_.begin : first;
    const int end = keys_.end < first + kChunkSize ? keys_.end : first + kChunkSize;
    if (begin >= end) return;
    const int group_begin = begin & ~15;
    score(first, group_begin, end);
    for (int r = 0; r < rows_; ++r) {
      F highest = splat(kEmpty);
      for (int t = group_begin; t < end; t += 16) highest = max(highest, load(&value_.w[r][t - first]));
      fresh[r].m = hmax(highest);
      weigh(first, group_begin, end, r, fresh[r]);
    }
    v_.clear(value_, p_.d);
    const int bytes = row_bytes(kCodecs[p_.v_cache.format.codec].bits, p_.d);
    for (int t = begin; t < end;) {
      const int page_end = (t / p_.page_size + 1) * p_.page_size, stop = page_end < end ? page_end : end;
      for (int ahead = t; ahead < stop; ahead += 16) prefetch(p_.k_cache, ahead + kChunkSize);
      v_.accumulate(value_, t - first, stop - first, row(p_.v_cache.codes, t, bytes), p_.d);
      t = stop;
    }
    v_.finish(value_, p_.d, chunk_o_);
    if (!is_integer(p_.v_cache)) return;
    // The codecs' sums are about the middle code: add what the zeros differ from it.
    const float* zero = param(p_.v_cache, kZero, kv_head_, p_);
    for (int r = 0; r < rows_; ++r) {
      for (int c = 0; c < p_.d; c += 16) {
        F shift = splat(zero_sum_[r]);
        if (!p_.v_cache.format.dynamic) shift = (load(zero + c) - splat(mid_code(p_.v_cache))) * splat(fresh[r].l);
        store(&chunk_o_[r][c], load(&chunk_o_[r][c]) - shift);
      }
    }
  }

  // Logits of the tokens group_begin .. end - 1 into value_.w, -inf where a row does not see a token.
  void score(int first, int group_begin, int end) {
    const Cache& k = p_.k_cache;
    const int bytes = row_bytes(kCodecs[k.format.codec].bits, p_.d), meta_bytes = k.format.meta_bytes();
    for (int t = group_begin; t < end; t += 16) {
      prefetch(p_.v_cache, t);
      k_.dots(query_, row(k.codes, t, bytes), p_.d, &value_.w[0][t - first], kChunkSize);
      F scale = splat(1.0f), zero = splat(0.0f);
      if (k.format.dynamic) read_meta(k, row(k.meta, t, meta_bytes), scale, zero);
      for (int r = 0; r < rows_; ++r) {
        float* logits = &value_.w[r][t - first];
        F sum = (load(logits) - splat(query_.q_mid[r])) * splat(query_.q_unit[r]);
        if (k.format.stored_zero) sum = sum - (zero - splat(mid_code(k))) * splat(q_sum_[r]);
        F logit = sum * scale * splat(p_.softmax_scale) + splat(base_[r]);
        if (p_.softcap > 0.0f) logit = soft_cap(logit, p_.softcap);
        store(logits, keep(logit, range_[r].begin - t, range_[r].end - t, splat(kEmpty)));
      }
    }
  }

  // Logits become weights: exp(logit - m), times the token's V scale; their sums, and 16-bit weights.
  void weigh(int first, int group_begin, int end, int r, State& s) {
    const Cache& v = p_.v_cache;
    const int meta_bytes = v.format.meta_bytes();
    const F m = splat(s.m), mid = splat(mid_code(v)), nothing = splat(0.0f);
    F sum = nothing, largest = nothing, zero_sum = nothing;
    for (int t = group_begin; t < end; t += 16) {
      float* w = &value_.w[r][t - first];
      F weight = s.m == kEmpty ? nothing : exp_nonpositive(load(w) - m);
      sum = sum + weight;
      if (v.format.dynamic) {
        F scale = splat(1.0f), zero = mid;
        read_meta(v, row(v.meta, t, meta_bytes), scale, zero);
        weight = keep(weight * scale, range_[r].begin - t, range_[r].end - t, nothing);
        if (v.format.stored_zero) {
          zero_sum = zero_sum + keep(weight * (zero - mid), range_[r].begin - t, range_[r].end - t, nothing);
        }
      }
      largest = max(largest, weight);
      store(w, weight);
    }
    s.l = hsum(sum);
    zero_sum_[r] = hsum(zero_sum);
    if (is_integer(v)) round_weights(first, group_begin, end, r, hmax(largest));
  }

  void round_weights(int first, int group_begin, int end, int r, float absmax) {
    value_.w_unit[r] = absmax / kWeightSteps;
    const F inverse = splat(absmax > 0.0f ? kWeightSteps / absmax : 0.0f);
    int32_t total = 0;
    for (int t = group_begin; t < end; t += 16) {
      int32_t rounded[16];
      istore(rounded, to_int(min(load(&value_.w[r][t - first]) * inverse, splat(kWeightSteps))));
      for (int i = 0; i < 16; ++i) {
        value_.w_int[r][t - first + i] = static_cast<int16_t>(rounded[i]);
        total += rounded[i];
      }
    }
    value_.w_sum[r] = static_cast<float>(total);
  }

  static constexpr float kWeightSteps = 32767.0f;

  const AttendParams& p_;
  const cpu::CodecOps& k_;
  const cpu::CodecOps& v_;
  const int kv_head_;
  const int32_t* table_;
  int rows_;
  KeyRange keys_;  // seen by any row
  KeyRange range_[kRows];
  int token_[kRows], head_[kRows];
  int64_t out_row_[kRows];
  bool bad_[kRows];  // the query holds NaN or infinity; its output is NaN
  float base_[kRows];  // added to every logit
  float q_sum_[kRows];  // sum of the effective query
  float zero_sum_[kRows];  // sum of weight * (zero - middle code), for zeros stored with the tokens
  State state_[kRows];
  QueryTile query_;
  ValueTile value_;
  alignas(64) float o_[kRows][kMaxHeadDim];
  alignas(64) float chunk_o_[kRows][kMaxHeadDim];
};

inline void attend_item(const AttendParams& p, const cpu::IsaOps& isa, const WorkItem& item, int kv_head) {
  const int rows = item.q_count * p.group.n;
  for (int first_row = 0; first_row < rows; first_row += kRows) Block(p, isa, item, kv_head, first_row).run(item);
}

inline void merge_item(const AttendParams& p, const cpu::IsaOps&, const MergeItem& item, int kv_head) {
  const int group = p.group.n;
  for (int i = 0; i < item.q_count; ++i) {
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      State s;
      alignas(64) float o[kMaxHeadDim];
      for (int part = 0; part < item.parts; ++part) {
        const int64_t index = item.first_partial + static_cast<int64_t>(part) * item.q_count + i;
        const Partial from = partial_at(p, index, head);
        merge_state(s, o, {from.ml[0], from.ml[1]}, from.o, p.d);
      }
      write_output(p, p.cu_seqlens_q[item.seq] + item.q_begin + i, head, s, o);
    }
  }
}

// A finished part (o, lse) is a state with l = 1.
inline void merge_row(const MergeParams& p, int64_t row) {
  State s;
  alignas(64) float o[kMaxHeadDim], part_o[kMaxHeadDim];
  for (int64_t part = 0; part < p.parts; ++part) {
    const int64_t at = part * p.rows + row;
    if (p.lse[at] == kEmpty) continue;
    read_row({p.o, p.dtype, p.d, 0}, at, 0, static_cast<int>(p.d), part_o);
    merge_state(s, o, {p.lse[at], 1.0f}, part_o, static_cast<int>(p.d));
  }
  if (s.m == kEmpty) std::memset(o, 0, p.d * sizeof(float));
  if (s.m != kEmpty) {
    for (int c = 0; c < p.d; c += 16) store(o + c, load(o + c) / splat(s.l));
  }
  write_row(p.out, p.dtype, row * p.d, o, static_cast<int>(p.d));
  p.out_lse[row] = s.m == kEmpty ? kEmpty : s.m + std::log(s.l);
}

}  // namespace foldkv::FOLDKV_ISA
