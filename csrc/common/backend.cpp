#include "common/backend.h"

#include "common/error.h"

namespace kvspn {

const Backend* find_backend(int32_t device) {
    if (device == KVSPN_DEVICE_CPU) return &cpu_backend;
#if defined(KVSPN_WITH_CUDA)
    if (device == KVSPN_DEVICE_CUDA) return &cuda_backend;
#endif
    return nullptr;
}

const Backend& get_backend(int32_t device) {
    const Backend* backend = find_backend(device);
    require(backend, "device must be a kvspn_device that the library is built for, got ", device);
    return *backend;
}

}  // namespace kvspn
