#define KVSPN_ENCODER avx2_encoder
#define KVSPN_ENCODER_NAME "avx2"
#include "cpu/encoder_vector_kernels.h"
