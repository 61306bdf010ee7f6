
#include <cmath>

#include "common/error.h"
#include "common/ops.h"
#include "common/rule.h"
#include "common/tensor.h"

namespace kvspn {
namespace {

constexpr int kMostBest = 64;  // tokens of a row that are told

constexpr std::initializer_list<Dtype> kCaches = {Dtype::fp32, Dtype::bf16, Dtype::fp16, Dtype::int8};

void check_rows(const char* name, const kvspn_tensor& tensor) {
    const int last = tensor.ndim - 1;
    require(tensor.shape[last] <= 1 || tensor.strides[last] == 1, name,
            " must be contiguous in its last dimension, got stride ", tensor.strides[last]);
}

// As check_tensor, and contiguous in the last dimension.
void check_given(const char* name, const kvspn_tensor& tensor, std::initializer_list<Dtype> dtypes,
                 std::initializer_list<int64_t> shape) {
    check_tensor(name, tensor, dtypes, shape);
    check_rows(name, tensor);
}

void check_optional(const char* name, const kvspn_tensor& tensor, std::initializer_list<Dtype> dtypes,
                    std::initializer_list<int64_t> shape) {
    if (given(tensor)) check_given(name, tensor, dtypes, shape);
}

void check_weight(const kvspn_tensor& weight, const kvspn_tensor& scale, int64_t inputs) {
    const bool int4 = weight.dtype == KVSPN_INT4;
    require(!int4 || inputs % 2 == 0, "x must have an even number of columns for int4, got ", inputs);
    check_given("weight", weight, kWeights, {-1, int4 ? inputs / 2 : inputs});
    const int64_t outputs = weight.shape[0];
    if (format_of(Dtype(weight.dtype)).scales == Scales::none)
        return require(!given(scale), "scale must be given with ", kScaledWeights, " alone, got one");
    if (!int4) return check_given("scale", scale, {Dtype::fp32}, {outputs});
    check_given("scale", scale, {Dtype::fp32}, {outputs, -1});
    const int64_t groups = scale.shape[1];
    require(groups && inputs % groups == 0, "scale must divide the ", inputs, " columns into groups, got ",
            groups);
    require(outputs <= 1 || scale.strides[0] == groups, "scale must be contiguous, got stride ",
            scale.strides[0]);
}

void check_norm(const kvspn_tensor& weight, const kvspn_tensor& bias, float eps, int64_t inputs) {
    require(given(weight) || !given(bias), "norm_bias must be given with norm_weight alone, got one");
    check_optional("norm_weight", weight, kFloats, {inputs});
    check_optional("norm_bias", bias, kFloats, {inputs});
    require(eps > 0, "eps must be positive, got ", eps);
}

// Of a cache kv [L, 2, B, H, S, D]: given with int8 alone.
void check_scale(const kvspn_tensor* scale, const kvspn_tensor& kv) {
    require(scale || kv.dtype != KVSPN_INT8, "kv_scale must be given with an int8 kv, got none");
    require(!scale || kv.dtype == KVSPN_INT8, "kv_scale must be given with an int8 kv alone, got one");
    if (scale)
        check_given("kv_scale", *scale, {Dtype::fp32},
                    {kv.shape[0], 2, kv.shape[2], kv.shape[3], kv.shape[4]});
}

// New keys or values for a cache: to one of int8 any floats.
void check_new(const char* name, const kvspn_tensor& tensor, const kvspn_tensor& kv,
               std::initializer_list<int64_t> shape) {
    if (kv.dtype == KVSPN_INT8)
        check_given(name, tensor, kFloats, shape);
    else
        check_given(name, tensor, {Dtype(kv.dtype)}, shape);
}

}  // namespace

void check(const kvspn_attention_params& p) {
    check_tensor("kv", p.kv, kCaches, {-1, 2, -1, -1, -1, -1});
    const int64_t layers = p.kv.shape[0], rows = p.kv.shape[2], heads = p.kv.shape[3], width = p.kv.shape[5];
    if (p.kv.dtype == KVSPN_INT8)
        check_tensor("q", p.q, kFloats, {rows, -1, -1, width});
    else
        check_tensor("q", p.q, {Dtype(p.kv.dtype)}, {rows, -1, -1, width});
    const auto dtype = {Dtype(p.q.dtype)};
    const int64_t query_heads = p.q.shape[1], queries = p.q.shape[2];
    check_tensor("lengths", p.lengths, {Dtype::int32}, {rows});
    check_tensor("out", p.out, dtype, {rows, queries, query_heads * width});
    check_rows("kv", p.kv);
    require(layers >= 1 && width >= 1, "kv must hold a layer and a column, got ", layers, " and ", width);
    require(heads >= 1 && query_heads % heads == 0, "q must have a multiple of kv's ", heads, " heads, got ",
            query_heads);
    require(p.tail || !p.tail_lengths, "tail must be given with tail_lengths, got a null pointer");
    require(!p.tail || p.tail_lengths, "tail_lengths must be given with tail, got a null pointer");
    check_scale(p.kv_scale, p.kv);
    require(!p.kv_scale || !p.tail, "tail must be a null pointer beside an int8 kv, got a tensor");
    require(std::isfinite(p.scale), "scale must be finite, got ", p.scale);
    if (p.tail) {
        check_tensor("tail", *p.tail, dtype, {2, rows, heads, -1, width});
        check_tensor("tail_lengths", *p.tail_lengths, {Dtype::int32}, {rows});
        check_rows("tail", *p.tail);
    }
    const int64_t capacity = p.kv.shape[4],
                  keys = layers * (capacity + kLanes) + (p.tail ? p.tail->shape[3] : 0);
    require(keys < (int64_t(1) << 30) && layers < (1 << 20) && queries < (1 << 30) && width < (1 << 20),
            "kv must have less than 2^30 keys, got ", keys);
}

void check(const kvspn_linear_params& p) {
    check_given("x", p.x, kFloats, {-1, -1});
    const int64_t rows = p.x.shape[0], inputs = p.x.shape[1];
    check_weight(p.weight, p.scale, inputs);
    const int64_t outputs = p.weight.shape[0];
    check_given("out", p.out, {Dtype(p.x.dtype)}, {rows, outputs});
    check_optional("bias", p.bias, kFloats, {outputs});
    check_norm(p.norm_weight, p.norm_bias, p.eps, inputs);
    check_optional("residual", p.residual, {Dtype(p.x.dtype)}, {rows, outputs});
}

void check(const kvspn_verify_params& p) {
    check_given("x", p.x, kFloats, {-1, -1, -1});
    const int64_t batch = p.x.shape[0], queries = p.x.shape[1], inputs = p.x.shape[2];
    require(queries >= 1, "x must hold at least one query, got 0");
    require(batch * queries < (1 << 30), "x must have less than 2^30 rows, got ", batch * queries);
    check_weight(p.weight, p.scale, inputs);
    const int64_t vocabulary = p.weight.shape[0];
    require(vocabulary >= 1, "weight must have at least one row, got 0");
    check_given("draft", p.draft, {Dtype::int32}, {batch, queries - 1});
    check_given("argmax", p.argmax, {Dtype::int32}, {batch, queries});
    check_given("rank", p.rank, {Dtype::int32}, {batch, queries - 1});
    check_optional("ids", p.ids, {Dtype::int32}, {vocabulary});
    require(!given(p.ids) || queries == 1, "x must hold one query with ids, got ", queries);
    const int64_t tokens = given(p.ids) ? kAny : vocabulary;
    check_optional("mask", p.mask, {Dtype::fp32}, {tokens});
    check_optional("first_mask", p.first_mask, {Dtype::fp32}, {given(p.mask) ? p.mask.shape[0] : tokens});
    check_norm(p.norm_weight, p.norm_bias, p.eps, inputs);
    check_optional("rules", p.rules, {Dtype::int32}, {batch, kAny});
    require(!given(p.rules) || p.rules.shape[1] == 8 || p.rules.shape[1] == kRuleWords,
            "rules must hold 8 or ", kRuleWords, " words of a row, got ", p.rules.shape[1]);
    check_optional("lengths", p.lengths, {Dtype::int32}, {batch});
    check_optional("tokens", p.tokens, {Dtype::int32}, {batch, kAny});
    for (auto& [name, tensor] :
         {std::pair<const char*, const kvspn_tensor&>{"lengths", p.lengths}, {"tokens", p.tokens}})
        require(given(p.rules) == given(tensor), name,
                " must be given with rules and with them alone, got one of the two");
    require(given(p.rules) || !given(p.first_mask), "rules must be given with first_mask, got none");
    check_optional("scores", p.scores, {Dtype::fp32}, {batch, queries, 3});
    require(given(p.best_tokens) == given(p.best_logits),
            "best_logits must be given with best_tokens and with it alone, got one of the two");
    check_optional("best_tokens", p.best_tokens, {Dtype::int32}, {batch, queries, kAny});
    if (!given(p.best_tokens)) return;
    const int64_t listed = p.best_tokens.shape[2];
    require(listed >= 1 && listed <= kMostBest, "best_tokens must hold 1 to ", kMostBest, " of a row, got ",
            listed);
    check_given("best_logits", p.best_logits, {Dtype::fp32}, {batch, queries, listed});
}

void check(const kvspn_append_params& p) {
    check_given("kv", p.kv, kCaches, {-1, 2, -1, -1, -1, -1});
    check_scale(given(p.kv_scale) ? &p.kv_scale : nullptr, p.kv);
    const int64_t rows = p.kv.shape[2], heads = p.kv.shape[3], width = p.kv.shape[5];
    check_new("k", p.k, p.kv, {rows, heads, -1, width});
    check_new("v", p.v, p.kv, {rows, heads, p.k.shape[2], width});
    check_given("lengths", p.lengths, {Dtype::int32}, {rows});
    check_optional("finished", p.finished, {Dtype::boolean}, {rows});
    require(p.layer >= 0 && p.layer < p.kv.shape[0], "layer must be 0 to ", p.kv.shape[0] - 1, ", got ",
            p.layer);
}

void check(const kvspn_accept_params& p) {
    check_given("tokens", p.tokens, {Dtype::int32}, {-1, -1});
    const int64_t rows = p.tokens.shape[0];
    check_given("lengths", p.lengths, {Dtype::int32}, {rows});
    check_given("finished", p.finished, {Dtype::boolean}, {rows});
    check_given("stats", p.stats, {Dtype::int32}, {rows, 3});
    check_given("argmax", p.argmax, {Dtype::int32}, {rows, -1});
    const int64_t queries = p.argmax.shape[1];
    require(queries >= 1, "argmax must hold at least one choice a row, got 0");
    check_given("draft", p.draft, {Dtype::int32}, {rows, queries - 1});
    check_given("rank", p.rank, {Dtype::int32}, {rows, queries - 1});
    require(given(p.scores) == given(p.log_probs),
            "log_probs must be given with scores and with them alone, got one of the two");
    check_optional("scores", p.scores, {Dtype::fp32}, {rows, queries, 3});
    check_optional("log_probs", p.log_probs, {Dtype::fp32}, {rows, p.tokens.shape[1]});
    require(p.k >= 1, "k must be at least 1, got ", p.k);
    require(p.eos >= -1, "eos must be at least -1, got ", p.eos);
    require(p.max_length >= 1 && p.max_length <= p.tokens.shape[1], "max_length must be 1 to ",
            p.tokens.shape[1], ", got ", p.max_length);
}

void check(const kvspn_compact_params& p) {
    check_given("kv", p.kv, kCaches, {-1, 2, -1, -1, -1, -1});
    check_scale(given(p.kv_scale) ? &p.kv_scale : nullptr, p.kv);
    const int64_t rows = p.kv.shape[2];
    check_given("rows", p.rows, {Dtype::int32}, {rows});
    check_given("source", p.source, {Dtype::int32}, {rows, -1});
    check_given("start", p.start, {Dtype::int32}, {rows});
}

}  // namespace kvspn
