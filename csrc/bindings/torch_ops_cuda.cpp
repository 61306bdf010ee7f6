// The CUDA kernels of the torch ops, on torch's current stream and with memory of its allocator. The tests'
// build of csrc/cuda registers them for tensors on the CPU, in a namespace of its own.
#if !defined(KVSPN_EMULATE)
#define USE_CUDA  // torch declares its streams then
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <exception>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/torch_tensor.h"

namespace {

using kvspn::view;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The device of a tensor and its current stream, while an op is put there.
class Place {
  public:
    explicit Place(const Tensor& tensor)
        : tensor_(tensor),
#if defined(KVSPN_EMULATE)
          stream_{nullptr, &allocate, this} {
    }
#else
          guard_(tensor.get_device_index()),
          stream_{nullptr, &allocate, this} {
        STD_TORCH_CHECK(!aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_.handle),
                        "torch has no stream for the device");
    }
#endif
    Place(const Place&) = delete;

    // Calls an op of the C ABI.
    template <class Params>
    void run(kvspn_status (*op)(const Params*), Params& params) {
        params.struct_size = sizeof params;
        params.stream = &stream_;
        const kvspn_status status = op(&params);
        if (error_) std::rethrow_exception(error_);
        STD_TORCH_CHECK(status == KVSPN_OK, kvspn_last_error());
    }

  private:
    // Torch gives the memory to others only behind what is on the stream now.
    static void* allocate(void* context, int64_t bytes) {
        Place& place = *static_cast<Place*>(context);
        try {
            place.scratch_.push_back(torch::stable::new_empty(place.tensor_, {&bytes, 1}, ScalarType::Byte));
            return place.scratch_.back().data_ptr();
        } catch (...) {
            place.error_ = std::current_exception();
            return nullptr;
        }
    }

    const Tensor& tensor_;
#if !defined(KVSPN_EMULATE)
    torch::stable::accelerator::DeviceGuard guard_;
#endif
    kvspn_stream stream_;
    std::vector<Tensor> scratch_;
    std::exception_ptr error_;
};

kvspn_tensor view(const char* name, const std::optional<Tensor>& tensor) {
    return tensor ? view(name, *tensor) : kvspn_tensor{name, nullptr, -1, 0, {}, {}};
}

// [..., K] as [R, K]; copied where the leading dimensions are not one.
kvspn_tensor rows(const char* name, Tensor& tensor) {
    const int64_t last = tensor.dim() - 1;
    STD_TORCH_CHECK(last >= 0, name, " must have shape [..., K], got []");
    int64_t count = 1, stride = 0;
    for (int64_t i = last - 1; i >= 0; --i) {
        if (tensor.size(i) == 1) continue;
        if (count == 1) stride = tensor.stride(i);
        if (count > 0 && tensor.stride(i) != stride * count) {
            tensor = torch::stable::contiguous(tensor);
            return rows(name, tensor);
        }
        count *= tensor.size(i);
    }
    kvspn_tensor out{name, tensor.data_ptr(), view(name, tensor).dtype, 2, {}, {}};
    out.shape[0] = count, out.shape[1] = tensor.size(last);
    out.strides[0] = stride, out.strides[1] = tensor.stride(last);
    return out;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
    return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

Tensor flat_kv_attention(Tensor q, Tensor kv, Tensor lengths, bool causal, std::optional<double> scale,
                         std::optional<Tensor> tail, std::optional<Tensor> tail_lengths) {
    const int64_t shape[] = {q.size(0), q.size(2), q.size(1) * q.size(3)};
    Tensor out = torch::stable::new_empty(q, {shape, 3});
    const kvspn_tensor tail_view = view("tail", tail), tail_lengths_view = view("tail_lengths", tail_lengths);
    kvspn_attention_params params{};
    params.q = view("q", q), params.kv = view("kv", kv);
    params.lengths = view("lengths", lengths), params.out = view("out", out);
    if (tail) params.tail = &tail_view;
    if (tail_lengths) params.tail_lengths = &tail_lengths_view;
    params.scale = float(scale ? *scale : 1 / std::sqrt(double(q.size(3))));
    params.causal = causal, params.parts = 1;
    Place(q).run(&kvspn_flat_kv_attention, params);
    return out;
}

Tensor fused_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> norm_weight,
                    std::optional<Tensor> norm_bias, double eps, bool gelu, std::optional<Tensor> residual,
                    std::optional<Tensor> scale) {
    kvspn_linear_params params{};
    params.x = rows("x", x);
    std::vector<int64_t> shape;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
    shape.push_back(weight.size(0));
    Tensor out = torch::stable::new_empty(x, {shape.data(), shape.size()});
    scale = contiguous(scale);
    params.weight = view("weight", weight), params.out = rows("out", out);
    params.scale = view("scale", scale), params.bias = view("bias", bias);
    params.norm_weight = view("norm_weight", norm_weight), params.norm_bias = view("norm_bias", norm_bias);
    if (residual) params.residual = rows("residual", *residual);
    params.eps = float(eps), params.gelu = gelu;
    Place(x).run(&kvspn_fused_linear, params);
    return out;
}

std::tuple<Tensor, Tensor> lm_head_verify(Tensor x, Tensor weight, Tensor draft, std::optional<Tensor> mask,
                                          std::optional<Tensor> scale, std::optional<Tensor> norm_weight,
                                          std::optional<Tensor> norm_bias, double eps) {
    const int64_t shape[] = {x.size(0), x.size(1)}, drafts[] = {draft.size(0), draft.size(1)};
    Tensor argmax = torch::stable::new_empty(draft, {shape, 2});
    Tensor rank = torch::stable::new_empty(draft, {drafts, 2});
    scale = contiguous(scale);
    kvspn_verify_params params{};
    params.x = view("x", x), params.weight = view("weight", weight), params.draft = view("draft", draft);
    params.argmax = view("argmax", argmax), params.rank = view("rank", rank);
    params.mask = view("mask", mask), params.scale = view("scale", scale);
    params.norm_weight = view("norm_weight", norm_weight), params.norm_bias = view("norm_bias", norm_bias);
    params.eps = float(eps);
    Place(x).run(&kvspn_lm_head_verify, params);
    return {argmax, rank};
}

void append_kv(Tensor kv, Tensor k, Tensor v, Tensor lengths, int64_t layer, std::optional<Tensor> finished) {
    kvspn_append_params params{};
    params.kv = view("kv", kv), params.k = view("k", k), params.v = view("v", v);
    params.lengths = view("lengths", lengths), params.finished = view("finished", finished);
    params.layer = int32_t(layer);
    Place(kv).run(&kvspn_append_kv, params);
}

void accept_and_rollback(Tensor tokens, Tensor lengths, Tensor finished, Tensor stats, Tensor draft,
                         Tensor argmax, Tensor rank, int64_t k, int64_t eos, int64_t max_length) {
    kvspn_accept_params params{};
    params.tokens = view("tokens", tokens), params.lengths = view("lengths", lengths);
    params.finished = view("finished", finished), params.stats = view("stats", stats);
    params.draft = view("draft", draft), params.rank = view("rank", rank);
    params.argmax = view("argmax", argmax);
    params.k = int32_t(k), params.eos = int32_t(eos), params.max_length = int32_t(max_length);
    Place(tokens).run(&kvspn_accept_and_rollback, params);
}

void compact_kv(Tensor kv, Tensor rows, Tensor source, Tensor start) {
    kvspn_compact_params params{};
    params.kv = view("kv", kv), params.rows = view("rows", rows);
    params.source = view("source", source), params.start = view("start", start);
    Place(kv).run(&kvspn_compact_kv, params);
}

}  // namespace

#if defined(KVSPN_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(kvspn_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(kvspn, CUDA, m) {
#endif
    m.impl("flat_kv_attention", TORCH_BOX(&flat_kv_attention));
    m.impl("fused_linear", TORCH_BOX(&fused_linear));
    m.impl("lm_head_verify", TORCH_BOX(&lm_head_verify));
    m.impl("append_kv", TORCH_BOX(&append_kv));
    m.impl("accept_and_rollback", TORCH_BOX(&accept_and_rollback));
    m.impl("compact_kv", TORCH_BOX(&compact_kv));
}
