#include "fp16/codec.cuh"
#include "cuda/variant.cuh"

FOLDKV_INSTANTIATE(Fp16, Fp16, 96)
