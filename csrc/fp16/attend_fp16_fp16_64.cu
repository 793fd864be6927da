#include "cuda/variant.cuh"
#include "fp16/codec.cuh"

FOLDKV_INSTANTIATE(Fp16, Fp16, 64)
