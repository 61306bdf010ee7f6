// Native kernels of the torch ops, for tensors on the CPU: torch's stable ABI, so one build serves later
// versions.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <mutex>
#include <optional>
#include <string>

#include "bindings/torch_tensor.h"

namespace {

using kvspn::view;
using torch::stable::Tensor;

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
