// The table of one instruction set: compiled once for each, with its flags (see setup.py).
#include "cpu/append.h"
#include "cpu/attend.h"

namespace foldkv::FOLDKV_ISA {

#define FOLDKV_CODEC(id, name, bits, kind) const cpu::CodecOps& name##_codec(int);
#include "codecs.def"
#undef FOLDKV_CODEC

#define FOLDKV_TEXT_(x) #x
#define FOLDKV_TEXT(x) FOLDKV_TEXT_(x)

const cpu::IsaOps& isa_ops() {
  static const cpu::IsaOps ops = {FOLDKV_TEXT(FOLDKV_ISA),
                                  {
#define FOLDKV_CODEC(id, name, bits, kind) &name##_codec(id),
#include "codecs.def"
#undef FOLDKV_CODEC
                                  },
                                  append_row,
                                  attend_item,
                                  merge_item,
                                  merge_row};
  return ops;
}

}  // namespace foldkv::FOLDKV_ISA
