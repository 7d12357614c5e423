// A file for each element type, so that they compile side by side.
#include "attention.cuh"

ATTENTION_INSTANCES(bf16, bf16)
