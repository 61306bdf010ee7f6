// Native kernels of the torch ops, for tensors on the CPU: torch's stable ABI, so one build serves later
// versions.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <mutex>
#include <optional>
#include <string>

#include "kvspn.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

kvspn_tensor view(const char* name, const Tensor& tensor) {
    kvspn_tensor out{name, tensor.data_ptr(), -1, int32_t(tensor.dim()), {}, {}};
    STD_TORCH_CHECK(tensor.dim() <= KVSPN_MAX_DIMS, name, " must have at most 6 dimensions, got ",
                    tensor.dim());
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
        case ScalarType::Char:
            out.dtype = KVSPN_INT8;
            break;
        case ScalarType::Int:
            out.dtype = KVSPN_INT32;
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

// The kernels read whole rows of D elements.
Tensor rows(const Tensor& tensor) {
    return tensor.size(tensor.dim() - 1) > 1 && tensor.stride(tensor.dim() - 1) != 1
               ? torch::stable::contiguous(tensor)
               : tensor;
}

Tensor flat_kv_attention(Tensor q, Tensor kv, Tensor lengths, bool causal, std::optional<double> scale,
                         std::optional<Tensor> tail, std::optional<Tensor> tail_lengths,
                         std::optional<Tensor> kv_scale) {
    const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), width = q.size(3);
    const int64_t shape[] = {batch, queries, heads * width};
    Tensor out = torch::stable::new_empty(q, {shape, 3});
    if (!out.numel()) return out;
    kv = rows(kv);
    if (tail) tail = rows(*tail);
    if (kv_scale) kv_scale = rows(*kv_scale);
    kvspn_tensor tail_view{}, tail_lengths_view{}, kv_scale_view{};
    kvspn_attention_params params{};
    params.struct_size = sizeof params;
    params.q = view("q", q);
    params.kv = view("kv", kv);
    params.lengths = view("lengths", lengths);
    params.out = view("out", out);
    if (tail) params.tail = &(tail_view = view("tail", *tail));
    if (tail_lengths) params.tail_lengths = &(tail_lengths_view = view("tail_lengths", *tail_lengths));
    if (kv_scale) params.kv_scale = &(kv_scale_view = view("kv_scale", *kv_scale));
    params.scale = scale ? float(*scale) : 1 / std::sqrt(float(width));
    params.causal = causal;
    params.parts = int32_t(std::min<int64_t>(torch::stable::get_num_threads(), batch * heads));
    std::mutex mutex;
    std::string error;  // exceptions must not leave a thread of the pool
    torch::stable::parallel_for(0, params.parts, 1, [&](int64_t first, int64_t last) {
        for (int64_t part = first; part < last; ++part) {
            kvspn_attention_params mine = params;
            mine.part = int32_t(part);
            if (kvspn_flat_kv_attention(&mine) == KVSPN_OK) continue;
            std::lock_guard<std::mutex> lock(mutex);
            error = kvspn_last_error();
        }
    });
    STD_TORCH_CHECK(error.empty(), error);
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kvspn, CPU, m) { m.impl("flat_kv_attention", TORCH_BOX(&flat_kv_attention)); }
