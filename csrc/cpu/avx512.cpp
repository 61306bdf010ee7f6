#define KVSPN_KERNELS avx512_kernels
#define KVSPN_KERNELS_NAME "avx512"
#include "cpu/vector_kernels.h"
