// C16 on the CPU: elements stored as they are, in fp16 or bf16; and fp32, the exact cache that reports compare with.
#include "core/float16.h"
#include "cpu/float_codec.h"

namespace foldkv::FOLDKV_ISA {

struct Fp32 {
  using Element = float;
  static constexpr float kMax = 0x1.fffffep127f;
  static F load16(const float* p) { return load(p); }
  static float from_float(float x) { return x; }
};

struct Fp16 {
  using Element = uint16_t;
  static constexpr float kMax = 65504.0f;
  static F load16(const uint16_t* p) { return load_f16(p); }
  static uint16_t from_float(float x) { return float_to_half(x); }
};

struct Bf16 {
  using Element = uint16_t;
  static constexpr float kMax = 0x1.fep127f;
  static F load16(const uint16_t* p) { return load_bf16(p); }
  static uint16_t from_float(float x) { return float_to_bf16(x); }
};

const cpu::CodecOps& fp32_codec(int id) { return float_codec<Fp32>(id); }
const cpu::CodecOps& fp16_codec(int id) { return float_codec<Fp16>(id); }
const cpu::CodecOps& bf16_codec(int id) { return float_codec<Bf16>(id); }

}  // namespace foldkv::FOLDKV_ISA
