// Tensors of torch's stable ABI as the C ABI takes them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "kvspn.h"

namespace kvspn {

inline kvspn_tensor view(const char* name, const torch::stable::Tensor& tensor) {
    kvspn_tensor out{name, tensor.data_ptr(), -1, int32_t(tensor.dim()), {}, {}};
    STD_TORCH_CHECK(tensor.dim() <= KVSPN_MAX_DIMS, name, " must have at most 6 dimensions, got ",
                    tensor.dim());
    using torch::headeronly::ScalarType;
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            out.dtype = KVSPN_FP32;
            break;
        case ScalarType::BFloat16:
            out.dtype = KVSPN_BF16;
            break;
        case ScalarType::Half:
            out.dtype = KVSPN_FP16;
            break;
        case ScalarType::Int:
            out.dtype = KVSPN_INT32;
            break;
        case ScalarType::Char:
            out.dtype = KVSPN_INT8;
            break;
        case ScalarType::Byte:
            out.dtype = KVSPN_INT4;
            break;
        case ScalarType::Float8_e4m3fn:
            out.dtype = KVSPN_FP8;
            break;
        case ScalarType::Bool:
            out.dtype = KVSPN_BOOL;
            break;
        default:
            break;
    }
    for (int i = 0; i < out.ndim; ++i) {
        out.shape[i] = tensor.size(i);
        out.strides[i] = tensor.stride(i);
    }
    return out;
}

}  // namespace kvspn
