// How kernels are put on a stream; for the files that the device's compiler reads.
#pragma once

#include "cuda/kernels.h"

namespace kvspn::cuda {

inline Device present_device() {
    int device, shared, multiprocessors, major;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "the device");
    check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "the device");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "the device");
#if defined(KVSPN_EMULATE)
    const int threads = 64;
#else
    const int threads = kThreads;
#endif
    return {device, multiprocessors, shared, threads, major >= 9};
}

template <class... Parameters>
const void* pointer(void (*kernel)(Parameters...)) {
    return reinterpret_cast<const void*>(kernel);
}

inline void allow_shared(const char* name, const void* kernel, int bytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
}

struct Grid {
    int blocks, shared_bytes = 0;
    bool cooperative = false;
};

template <class... Parameters, class... Arguments>
void launch(const char* name, const Device& device, void (*kernel)(Parameters...), const Grid& grid,
            cudaStream_t stream, Arguments... arguments) {
    cudaLaunchAttribute attribute{};
    if (grid.cooperative)
        attribute.id = cudaLaunchAttributeCooperative, attribute.val.cooperative = 1;
    else
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization,
        attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim.x = unsigned(grid.blocks), config.blockDim.x = unsigned(device.threads);
    config.dynamicSmemBytes = size_t(grid.shared_bytes), config.stream = stream;
    config.attrs = &attribute, config.numAttrs = grid.cooperative || device.overlap;
    check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace kvspn::cuda
