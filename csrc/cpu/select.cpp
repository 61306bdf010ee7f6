#include <cstdlib>
#include <cstring>

#include "common/error.h"
#include "cpu/encoder_kernels.h"
#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kvspn {
namespace {

#if defined(__x86_64__)
bool avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool avx512vnni() { return avx512() && __builtin_cpu_supports("avx512vnni"); }
bool avx512bf16() { return avx512vnni() && __builtin_cpu_supports("avx512bf16"); }
bool avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// Tiles, and the system's leave to use them, which a process asks for once.
bool amx() {
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if ((d & (kBf16 | kTile | kInt8)) != (kBf16 | kTile | kInt8)) return false;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif
bool always() { return true; }

struct InstructionSet {
    const char* name;
    bool (*supported)();
    const Kernels* kernels;
    const EncoderKernels* encoder;
};

// The fastest first.
constexpr InstructionSet kSets[] = {
#if defined(__x86_64__)
    {"amx", amx, &avx512vnni_kernels, &amx_encoder},
    {"avx512bf16", avx512bf16, &avx512vnni_kernels, &avx512bf16_encoder},
    {"avx512vnni", avx512vnni, &avx512vnni_kernels, &avx512vnni_encoder},
    {"avx512", avx512, &avx512_kernels, &avx512_encoder},
    {"avx2", avx2, &avx2_kernels, &avx2_encoder},
#endif
    {"portable", always, &portable_kernels, &portable_encoder},
};

const InstructionSet& select(const char* variant) {
    const char* overriding = std::getenv("KVSPN_CPU");
    const bool overridden = overriding && *overriding;
    const char *name = overridden ? overriding : variant, *given = overridden ? "KVSPN_CPU" : "variant";
    for (const InstructionSet& set : kSets) {
        if (name ? !std::strcmp(name, set.name) : set.supported()) {
            require(set.supported(), given, " must be an instruction set of this machine, got ", name);
            return set;
        }
    }
    require(false, given, " must be amx, avx512bf16, avx512vnni, avx512, avx2 or portable, got ", name);
    return kSets[0];
}

}  // namespace

const Kernels& select_kernels(const char* variant) { return *select(variant).kernels; }

const EncoderKernels& select_encoder_kernels(const char* variant) { return *select(variant).encoder; }

}  // namespace kvspn
