#define KVSPN_KERNELS avx512vnni_kernels
#define KVSPN_KERNELS_NAME "avx512vnni"
#include "cpu/vector_kernels.h"
