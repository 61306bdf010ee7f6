#include <cstdlib>
#include <cstring>

#include "common/error.h"
#include "cpu/kernels.h"

namespace kvspn {
namespace {

// The fastest first.
constexpr const Kernels* kTables[] = {
#if defined(__x86_64__)
    &avx512vnni_kernels,
    &avx512_kernels,
    &avx2_kernels,
#endif
    &portable_kernels,
};

bool supported(const Kernels& kernels) {
#if defined(__x86_64__)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (&kernels == &avx512vnni_kernels) return avx512 && __builtin_cpu_supports("avx512vnni");
    if (&kernels == &avx512_kernels) return avx512;
    if (&kernels == &avx2_kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return &kernels == &portable_kernels;
}

}  // namespace

const Kernels& select_kernels(const char* variant) {
    const char* overriding = std::getenv("KVSPN_CPU");
    const bool overridden = overriding && *overriding;
    const char *name = overridden ? overriding : variant, *given = overridden ? "KVSPN_CPU" : "variant";
    for (const Kernels* kernels : kTables) {
        if (name ? !std::strcmp(name, kernels->name) : supported(*kernels)) {
            require(supported(*kernels), given, " must be an instruction set of this machine, got ", name);
            return *kernels;
        }
    }
    require(false, given, " must be avx512vnni, avx512, avx2 or portable, got ", name);
    return portable_kernels;
}

}  // namespace kvspn
