// The part of DLPack's protocol (v0.8, unversioned capsules) that a consumer of CPU tensors needs.
#pragma once

#include <cstdint>

struct DLDevice {
    int32_t device_type;  // 1: CPU
    int32_t device_id;
};

struct DLDataType {
    uint8_t code;  // 0 int, 1 uint, 2 float, 4 bfloat, 6 bool, 10 float8_e4m3fn
    uint8_t bits;
    uint16_t lanes;
};

struct DLTensor {
    void* data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t* shape;
    int64_t* strides;  // null: contiguous
    uint64_t byte_offset;
};

struct DLManagedTensor {
    DLTensor dl_tensor;
    void* manager_ctx;
    void (*deleter)(DLManagedTensor*);
};
