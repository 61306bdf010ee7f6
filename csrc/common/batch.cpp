#include "common/batch.h"

#include <tuple>

#include "common/error.h"

namespace kvspn {

Batch check_batch(const kvspn_batch& b, const Weights& weights) {
    const int64_t layers = int64_t(weights.layers.size()), heads = weights.architecture.key_heads,
                  width = weights.head_dim;
    check_tensor("kv", b.kv, {Dtype::fp32, Dtype::bf16, Dtype::fp16, Dtype::int8},
                 {layers, 2, -1, heads, -1, width});
    const int64_t rows = b.kv.shape[2], capacity = b.kv.shape[4];
    check_tensor("lengths", b.lengths, {Dtype::int32}, {rows});
    check_tensor("tokens", b.tokens, {Dtype::int32}, {rows, -1});
    check_tensor("finished", b.finished, {Dtype::boolean}, {rows});
    check_tensor("stats", b.stats, {Dtype::int32}, {rows, 3});
    check_tensor("cross_kv", b.cross_kv, {Dtype(b.kv.dtype)}, {layers, 2, rows, heads, -1, width});
    check_tensor("cross_lengths", b.cross_lengths, {Dtype::int32}, {rows});
    const int64_t cross = b.cross_kv.shape[4], tokens = b.tokens.shape[1];
    for (int64_t size : {rows, capacity, tokens, weights.architecture.cross ? cross : cross + 1})
        require(size >= 1 && size < (1 << 24), "kv, cross_kv and tokens must have 1 to 2^24 rows, got ",
                size);
    require(weights.architecture.cross || !cross, "cross_kv must be empty with no_cross, got ", cross,
            " positions");
    for (auto& [name, tensor] : {std::pair<const char*, const kvspn_tensor*>{"kv", &b.kv},
                                 {"lengths", &b.lengths},
                                 {"tokens", &b.tokens},
                                 {"finished", &b.finished},
                                 {"stats", &b.stats},
                                 {"cross_kv", &b.cross_kv},
                                 {"cross_lengths", &b.cross_lengths}})
        check_contiguous(name, *tensor);
    const bool scaled = b.kv.dtype == KVSPN_INT8;
    for (auto& [name, tensor, positions] :
         {std::tuple<const char*, const kvspn_tensor*, int64_t>{"kv_scale", b.kv_scale, capacity},
          {"cross_kv_scale", b.cross_kv_scale, cross}}) {
        require(tensor || !scaled, name, " must be given with int8 caches, got a null pointer");
        require(scaled || !tensor, name, " must be a null pointer without int8 caches, got a tensor");
        if (!tensor) continue;
        check_tensor(name, *tensor, {Dtype::fp32}, {layers, 2, rows, heads, positions});
        check_contiguous(name, *tensor);
    }
    const kvspn_tensor* queries = b.cross_queries;
    require(!queries || weights.architecture.cross,
            "cross_queries must be a null pointer with no_cross, got a tensor");
    if (queries) {
        check_tensor("cross_queries", *queries, {Dtype::fp32}, {layers, rows, -1, heads * width});
        require(queries->shape[2] >= capacity && queries->shape[2] < (1 << 24), "cross_queries must have ",
                capacity, " to 2^24 positions, got ", queries->shape[2]);
        check_contiguous("cross_queries", *queries);
    }
    const auto cache = [](const kvspn_tensor& kv, const kvspn_tensor* scale, const kvspn_tensor& lengths) {
        return Cache{static_cast<char*>(kv.data), scale ? static_cast<float*>(scale->data) : nullptr,
                     static_cast<int32_t*>(lengths.data), int(kv.shape[4])};
    };
    return {Dtype(b.kv.dtype),
            cache(b.kv, b.kv_scale, b.lengths),
            cache(b.cross_kv, b.cross_kv_scale, b.cross_lengths),
            static_cast<int32_t*>(b.tokens.data),
            static_cast<int32_t*>(b.stats.data),
            static_cast<uint8_t*>(b.finished.data),
            int(rows),
            int(tokens),
            int(layers),
            int(heads),
            int(width),
            queries ? static_cast<float*>(queries->data) : nullptr,
            queries ? int(queries->shape[2]) : 0};
}

}  // namespace kvspn
