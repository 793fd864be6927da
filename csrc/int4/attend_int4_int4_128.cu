#include "int4/codec.cuh"
#include "cuda/variant.cuh"

FOLDKV_INSTANTIATE(Int4, Int4, 128)
