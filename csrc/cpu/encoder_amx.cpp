#define KVSPN_ENCODER amx_encoder
#define KVSPN_ENCODER_NAME "amx"
#include "cpu/encoder_vector_kernels.h"
