// fused_linear and lm_head_verify on the CPU, from weights as the caller holds them.
#include <cstring>
#include <memory>
#include <vector>

#include "common/error.h"
#include "common/memory.h"
#include "common/ops.h"
#include "common/tensor.h"
#include "cpu/judge.h"
#include "cpu/parts.h"

namespace kvspn::cpu {
namespace {

constexpr int kLeast = 1 << 15;  // weights that are worth a thread

// [LayerNorm ->] x W^T of rows [R, K], not yet rounded.
class Product {
  public:
    // x [R, K] or [B, Q, K].
    Product(const kvspn_tensor& x, const kvspn_tensor& weight, const kvspn_tensor& scale,
            const kvspn_stream* stream)
        : rows(1),
          outputs(int(weight.shape[0])),
          inputs_(int(x.shape[x.ndim - 1])),
          parts_(stream, int64_t(outputs) * inputs_ / kLeast) {
        for (int i = 0; i + 1 < x.ndim; ++i) rows *= int(x.shape[i]);
        x_ = scratch<float>(size_t(rows) * inputs_), y_ = scratch<float>(size_t(rows) * outputs);
        const int64_t batches = x.ndim == 3 ? x.shape[0] : 1, queries = x.shape[x.ndim - 2];
        for (int64_t b = 0; b < batches; ++b) {
            kvspn_tensor one = x;
            if (x.ndim == 3)
                one.data = static_cast<char*>(x.data) + b * x.strides[0] * int64_t(size_of(Dtype(x.dtype)));
            read_rows(one, queries, inputs_, x_.get() + b * queries * inputs_, inputs_);
        }
        const bool int4 = weight.dtype == KVSPN_INT4;
        matrix_ = {Dtype(weight.dtype),
                   weight.data,
                   weight.strides[0],
                   static_cast<const float*>(scale.data),
                   given(scale) ? scale.strides[0] : 0,
                   int4 ? int(scale.shape[1]) : 1,
                   inputs_};
    }

    void normalise(const kvspn_tensor& weight, const kvspn_tensor& bias, float eps) {
        if (!given(weight)) return;
        std::vector<float> w(inputs_), b(inputs_);
        read_rows(weight, 1, inputs_, w.data(), inputs_);
        if (given(bias)) read_rows(bias, 1, inputs_, b.data(), inputs_);
        for (int r = 0; r < rows; ++r) {
            float* x = x_.get() + int64_t(r) * inputs_;
            kernels.layer_norm(x, w.data(), b.data(), inputs_, eps, x);
        }
    }

    // Every row's outputs; then finish(row, first, last) of each thread's own.
    template <class Finish>
    void run(const Finish& finish) const {
        parts_.run([&](int part) {
            auto [first, last] = share(outputs, part, parts_.count());
            kernels.linear_by_rows(matrix_, x_.get(), inputs_, rows, first, last, y_.get(), outputs);
            for (int r = 0; r < rows; ++r) finish(r, first, last);
        });
    }

    float* row(int r) const { return y_.get() + int64_t(r) * outputs; }

    int rows, outputs;
    const Kernels& kernels = select_kernels(nullptr);

  private:
    int inputs_;
    Parts parts_;
    RowMatrix matrix_;
    std::unique_ptr<float[]> x_, y_;
};

}  // namespace

void fused_linear(const kvspn_linear_params& p) {
    check(p);
    Product product(p.x, p.weight, p.scale, p.stream);
    product.normalise(p.norm_weight, p.norm_bias, p.eps);
    const auto at = [](const kvspn_tensor& tensor, int r, int n) {
        return r * tensor.strides[0] + n * tensor.strides[1];
    };
    product.run([&](int r, int first, int last) {
        float* y = product.row(r);
        if (given(p.bias))
            for (int n = first; n < last; ++n) y[n] += element(p.bias, n * p.bias.strides[0]);
        if (p.gelu) product.kernels.gelu(y + first, last - first);
        if (given(p.residual))
            for (int n = first; n < last; ++n) y[n] += element(p.residual, at(p.residual, r, n));
        for (int n = first; n < last; ++n) store(Dtype(p.out.dtype), p.out.data, at(p.out, r, n), y[n]);
    });
}

void lm_head_verify(const kvspn_verify_params& p) {
    check(p);
    Product product(p.x, p.weight, p.scale, p.stream);
    product.normalise(p.norm_weight, p.norm_bias, p.eps);
    const auto *mask = static_cast<const float*>(p.mask.data),
               *first_mask = static_cast<const float*>(p.first_mask.data);
    const auto* ids = static_cast<const int32_t*>(p.ids.data);
    const int queries = int(p.x.shape[1]), vocabulary = product.outputs;
    if (const kvspn_tensor& any = mask ? p.mask : p.first_mask; ids && given(any))
        for (int n = 0; n < vocabulary; ++n)
            require(ids[n] >= 0 && ids[n] < any.shape[0], "ids must be 0 to ", any.shape[0] - 1, ", got ",
                    ids[n]);
    product.run([](int, int, int) {});
    const auto at = [](const kvspn_tensor& tensor, int b, int q) {
        return static_cast<int32_t*>(tensor.data) + b * tensor.strides[0] + q * tensor.strides[1];
    };
    const bool scored = given(p.scores);
    const int listed = given(p.best_tokens) ? int(p.best_tokens.shape[2]) : 0;
    const Parts parts(p.stream, product.rows);
    const int strips = (vocabulary + kStrip - 1) / kStrip;
    parts.run([&](int part) {
        std::vector<Partition> partitions(scored || given(p.rules) ? size_t(kKinds) * strips : 0);
        std::vector<Ranked> ranked;
        for (int r = part; r < product.rows; r += parts.count()) {
            float* logits = product.row(r);
            const int b = r / queries, q = r % queries;
            RowRule rule{};
            Judge judge{product.kernels, mask, ids, &rule, 0, {}, vocabulary};
            if (given(p.rules)) {
                std::memcpy(&rule, static_cast<const int32_t*>(p.rules.data) + b * p.rules.strides[0],
                            size_t(p.rules.shape[1]) * sizeof(int32_t));
                const int32_t length = static_cast<const int32_t*>(p.lengths.data)[b * p.lengths.strides[0]];
                judge.index = length + q + 1;
                if (first_mask && judge.index == rule.first) judge.mask = first_mask;
                History history;
                for (int64_t t = std::max(rule.first - rule.prefix, 0);
                     rule.times && t <= std::min<int64_t>(length, p.tokens.shape[1] - 1); ++t)
                    push(history, *at(p.tokens, b, int(t)), rule);
                for (int i = 0; i < q; ++i) push(history, *at(p.draft, b, i), rule);
                judge.window = window_of(rule, history);
            }
            const bool judged = q + 1 < queries;
            const int32_t draft = judged ? *at(p.draft, b, q) : -1;
            int found_best = 0;
            if (listed || is_cut(rule)) {
                const int n = std::min(std::max(listed, is_cut(rule) ? rule.top_k : 0), vocabulary);
                ranked.resize(size_t(n));
                found_best = std::min(judge.rank(logits, partitions.data(), n, ranked.data()), listed);
            }
            Best best[kKinds];
            if (draft >= 0 && draft < vocabulary) judge.expect(draft, logits[draft], best);
            judge.hear(logits, 0, vocabulary, best, scored || rule.times ? partitions.data() : nullptr);
            const Best found = judge.decide(best, partitions.data(), scored);
            const bool counts = found.id >= 0 && found.draft >= 0;
            *at(p.argmax, b, q) = ids && found.id >= 0 ? ids[found.id] : found.id;
            if (judged) *at(p.rank, b, q) = counts ? found.above : KVSPN_K_INF;
            for (int i = 0; i < listed; ++i) {
                const bool there = found.id >= 0 && i < found_best;
                const int id = there ? ranked[size_t(i)].id : -1;
                at(p.best_tokens, b, q)[i] = ids && there ? ids[id] : id;
                float* to = static_cast<float*>(p.best_logits.data) + b * p.best_logits.strides[0] +
                            q * p.best_logits.strides[1];
                to[i] = there ? ranked[size_t(i)].logit : -INFINITY;
            }
            if (!scored) continue;
            float* scores =
                static_cast<float*>(p.scores.data) + b * p.scores.strides[0] + q * p.scores.strides[1];
            scores[0] = found.log_sum_exp, scores[1] = found.logit, scores[2] = found.draft_logit;
        }
    });
}

}  // namespace kvspn::cpu
