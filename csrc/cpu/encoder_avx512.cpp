#define KVSPN_ENCODER avx512_encoder
#define KVSPN_ENCODER_NAME "avx512"
#include "cpu/encoder_vector_kernels.h"
