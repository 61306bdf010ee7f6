#define KVSPN_ENCODER portable_encoder
#define KVSPN_ENCODER_NAME "portable"
#include "cpu/encoder_vector_kernels.h"
