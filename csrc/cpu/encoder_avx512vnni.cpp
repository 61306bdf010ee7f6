#define KVSPN_ENCODER avx512vnni_encoder
#define KVSPN_ENCODER_NAME "avx512vnni"
#include "cpu/encoder_vector_kernels.h"
