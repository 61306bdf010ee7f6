// The kernels of the torch ops, through the C ABI: for tensors on the CPU or, with KVSPN_WITH_CUDA, on CUDA
// devices, on torch's current stream and with memory of its allocator. (The tests' build of csrc/cuda
// registers them for tensors on the CPU, in a namespace of its own.) Torch's stable ABI, so one build serves
// later versions.
#if defined(KVSPN_WITH_CUDA) && !defined(KVSPN_EMULATE)
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

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Where a tensor is, while an op is put there: the device's current stream, or torch's threads.
class Place {
  public:
    explicit Place(const Tensor& tensor)
        : tensor_(tensor),
#if !defined(KVSPN_WITH_CUDA)
          stream_{nullptr, nullptr, nullptr, &run_parts, int32_t(torch::stable::get_num_threads())} {
    }
#elif defined(KVSPN_EMULATE)
          stream_{nullptr, &allocate, this, nullptr, 0} {
    }
#else
          guard_(tensor.get_device_index()),
          stream_{nullptr, &allocate, this, nullptr, 0} {
        STD_TORCH_CHECK(!aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_.handle),
                        "torch has no stream for the device");
    }
#endif
    Place(const Place&) = delete;

    kvspn_tensor view(const char* name, const Tensor& tensor) const {
        STD_TORCH_CHECK(tensor.defined(), name, " must be a tensor, got None");
        STD_TORCH_CHECK(tensor.device() == tensor_.device(), name,
                        " must be on one device with the other tensors, got another");
        return kvspn::view(name, tensor);
    }
    kvspn_tensor view(const char* name, const std::optional<Tensor>& tensor) const {
        return tensor ? view(name, *tensor) : kvspn_tensor{name, nullptr, -1, 0, {}, {}};
    }

    // [..., K] as [R, K]; copied where the leading dimensions are not one.
    kvspn_tensor rows(const char* name, Tensor& tensor) const {
        const kvspn_tensor whole = view(name, tensor);
        const int last = whole.ndim - 1;
        STD_TORCH_CHECK(last >= 0, name, " must have shape [..., K], got []");
        kvspn_tensor out{name, whole.data, whole.dtype, 2, {}, {}};
        int64_t count = 1, stride = 0;
        for (int i = last - 1; i >= 0; --i) {
            if (whole.shape[i] == 1) continue;
            if (count == 1) stride = whole.strides[i];
            if (count && whole.strides[i] != stride * count) {
                tensor = torch::stable::contiguous(tensor);
                return rows(name, tensor);
            }
            count *= whole.shape[i];
        }
        out.shape[0] = count, out.shape[1] = whole.shape[last];
        out.strides[0] = stride, out.strides[1] = whole.strides[last];
        return out;
    }

    // Calls an op of the C ABI.
    template <class Params>
    void run(kvspn_status (*op)(const Params*), Params& params) {
        params.struct_size = sizeof params;
        params.stream = &stream_;
#if defined(KVSPN_WITH_CUDA)
        params.device = KVSPN_DEVICE_CUDA;
#endif
        const kvspn_status status = op(&params);
        if (error_) std::rethrow_exception(error_);
        STD_TORCH_CHECK(status == KVSPN_OK, kvspn_last_error());
    }

  private:
#if defined(KVSPN_WITH_CUDA)
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
#else
    static void run_parts(void*, int32_t parts, void (*work)(void*, int32_t), void* argument) {
        torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
            for (int64_t part = first; part < last; ++part) work(argument, int32_t(part));
        });
    }
#endif

    const Tensor& tensor_;
#if defined(KVSPN_WITH_CUDA) && !defined(KVSPN_EMULATE)
    torch::stable::accelerator::DeviceGuard guard_;
#endif
    kvspn_stream stream_;
    std::vector<Tensor> scratch_;
    std::exception_ptr error_;
};

int32_t integer(const char* name, int64_t value) {
    STD_TORCH_CHECK(value >= INT32_MIN && value <= INT32_MAX, name, " must fit into 32 bits, got ", value);
    return int32_t(value);
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
    return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

Tensor flat_kv_attention(Tensor q, Tensor kv, Tensor lengths, bool causal, std::optional<double> scale,
                         std::optional<Tensor> tail, std::optional<Tensor> tail_lengths,
                         std::optional<Tensor> kv_scale) {
    Place place(q);
    const int64_t shape[] = {q.size(0), q.size(2), q.size(1) * q.size(3)};
    Tensor out = torch::stable::new_empty(q, {shape, 3});
    const kvspn_tensor tail_view = place.view("tail", tail),
                       tail_lengths_view = place.view("tail_lengths", tail_lengths),
                       kv_scale_view = place.view("kv_scale", kv_scale);
    kvspn_attention_params params{};
    params.q = place.view("q", q), params.kv = place.view("kv", kv);
    params.lengths = place.view("lengths", lengths), params.out = place.view("out", out);
    if (tail) params.tail = &tail_view;
    if (tail_lengths) params.tail_lengths = &tail_lengths_view;
    if (kv_scale) params.kv_scale = &kv_scale_view;
    params.scale = float(scale ? *scale : 1 / std::sqrt(double(q.size(3))));
    params.causal = causal;
    place.run(&kvspn_flat_kv_attention, params);
    return out;
}

Tensor fused_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> norm_weight,
                    std::optional<Tensor> norm_bias, double eps, bool gelu, std::optional<Tensor> residual,
                    std::optional<Tensor> scale) {
    Place place(x);
    kvspn_linear_params params{};
    params.x = place.rows("x", x);
    std::vector<int64_t> shape;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
    shape.push_back(weight.size(0));
    Tensor out = torch::stable::new_empty(x, {shape.data(), shape.size()});
    scale = contiguous(scale);
    params.weight = place.view("weight", weight), params.out = place.rows("out", out);
    params.scale = place.view("scale", scale), params.bias = place.view("bias", bias);
    params.norm_weight = place.view("norm_weight", norm_weight),
    params.norm_bias = place.view("norm_bias", norm_bias);
    if (residual) {
        params.residual = place.rows("residual", *residual);
        bool alike = residual->dim() == x.dim();
        for (int64_t i = 0; alike && i + 1 < x.dim(); ++i) alike = residual->size(i) == x.size(i);
        STD_TORCH_CHECK(alike, "residual must have x's shape but for the last dimension, got another");
    }
    params.eps = float(eps), params.gelu = gelu;
    place.run(&kvspn_fused_linear, params);
    return out;
}

std::tuple<Tensor, Tensor> lm_head_verify(Tensor x, Tensor weight, Tensor draft, std::optional<Tensor> mask,
                                          std::optional<Tensor> scale, std::optional<Tensor> norm_weight,
                                          std::optional<Tensor> norm_bias, double eps,
                                          std::optional<Tensor> ids, std::optional<Tensor> first_mask,
                                          std::optional<Tensor> rules, std::optional<Tensor> lengths,
                                          std::optional<Tensor> tokens, std::optional<Tensor> scores,
                                          std::optional<Tensor> best_tokens,
                                          std::optional<Tensor> best_logits) {
    Place place(x);
    const int64_t shape[] = {x.size(0), x.size(1)}, drafts[] = {draft.size(0), draft.size(1)};
    Tensor argmax = torch::stable::new_empty(draft, {shape, 2});
    Tensor rank = torch::stable::new_empty(draft, {drafts, 2});
    scale = contiguous(scale);
    kvspn_verify_params params{};
    params.x = place.view("x", x), params.weight = place.view("weight", weight),
    params.draft = place.view("draft", draft);
    params.argmax = place.view("argmax", argmax), params.rank = place.view("rank", rank);
    params.mask = place.view("mask", mask), params.scale = place.view("scale", scale);
    params.norm_weight = place.view("norm_weight", norm_weight),
    params.norm_bias = place.view("norm_bias", norm_bias);
    params.eps = float(eps);
    params.ids = place.view("ids", ids), params.first_mask = place.view("first_mask", first_mask);
    params.rules = place.view("rules", rules), params.lengths = place.view("lengths", lengths);
    params.tokens = place.view("tokens", tokens), params.scores = place.view("scores", scores);
    params.best_tokens = place.view("best_tokens", best_tokens);
    params.best_logits = place.view("best_logits", best_logits);
    place.run(&kvspn_lm_head_verify, params);
    return {argmax, rank};
}

void append_kv(Tensor kv, Tensor k, Tensor v, Tensor lengths, int64_t layer, std::optional<Tensor> finished,
               std::optional<Tensor> kv_scale) {
    Place place(kv);
    kvspn_append_params params{};
    params.kv = place.view("kv", kv), params.k = place.view("k", k), params.v = place.view("v", v);
    params.lengths = place.view("lengths", lengths), params.finished = place.view("finished", finished);
    params.layer = integer("layer", layer), params.kv_scale = place.view("kv_scale", kv_scale);
    place.run(&kvspn_append_kv, params);
}

void accept_and_rollback(Tensor tokens, Tensor lengths, Tensor finished, Tensor stats, Tensor draft,
                         Tensor argmax, Tensor rank, int64_t k, int64_t eos, int64_t max_length,
                         std::optional<Tensor> scores, std::optional<Tensor> log_probs) {
    Place place(tokens);
    kvspn_accept_params params{};
    params.tokens = place.view("tokens", tokens), params.lengths = place.view("lengths", lengths);
    params.finished = place.view("finished", finished), params.stats = place.view("stats", stats);
    params.draft = place.view("draft", draft), params.rank = place.view("rank", rank);
    params.argmax = place.view("argmax", argmax);
    params.k = integer("k", k), params.eos = integer("eos", eos);
    params.max_length = integer("max_length", max_length);
    params.scores = place.view("scores", scores), params.log_probs = place.view("log_probs", log_probs);
    place.run(&kvspn_accept_and_rollback, params);
}

void compact_kv(Tensor kv, Tensor rows, Tensor source, Tensor start, std::optional<Tensor> kv_scale) {
    Place place(kv);
    kvspn_compact_params params{};
    params.kv = place.view("kv", kv), params.rows = place.view("rows", rows);
    params.source = place.view("source", source), params.start = place.view("start", start);
    params.kv_scale = place.view("kv_scale", kv_scale);
    place.run(&kvspn_compact_kv, params);
}

}  // namespace

#if !defined(KVSPN_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(kvspn, CPU, m) {
#elif defined(KVSPN_EMULATE)
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
