#define KVSPN_ENCODER avx512bf16_encoder
#define KVSPN_ENCODER_NAME "avx512bf16"
#include "cpu/encoder_vector_kernels.h"
