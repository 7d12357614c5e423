// A file for each element type, so that they compile side by side.
#include "attention.cuh"

ATTENTION_INSTANCES(f16, f16)
