#define KVSPN_KERNELS portable_kernels
#define KVSPN_KERNELS_NAME "portable"
#include "cpu/vector_kernels.h"
