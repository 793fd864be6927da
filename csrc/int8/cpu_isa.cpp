// C8 on the CPU: one unsigned code a byte.
#include "cpu/integer_codec.h"

namespace foldkv::FOLDKV_ISA {

struct Int8 {
  static constexpr int kBits = 8;
  static W widen(const uint8_t* p) { return widen_u8(p); }
  static constexpr int channel(int lane) { return lane; }
};

const cpu::CodecOps& int8_codec(int id) { return integer_codec<Int8>(id); }

}  // namespace foldkv::FOLDKV_ISA
