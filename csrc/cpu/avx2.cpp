#define KVSPN_KERNELS avx2_kernels
#define KVSPN_KERNELS_NAME "avx2"
#include "cpu/vector_kernels.h"
