#include "cuda/variant.cuh"
#include "int4/codec.cuh"

FOLDKV_INSTANTIATE(Int4, Int4, 64)
