#include "fp16/codec.cuh"
#include "cuda/variant.cuh"

FOLDKV_INSTANTIATE(Bf16, Bf16, 64)
