#include "cuda/variant.cuh"
#include "fp16/codec.cuh"

FOLDKV_INSTANTIATE(Bf16, Bf16, 96)
