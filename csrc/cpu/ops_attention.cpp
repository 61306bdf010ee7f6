// Attention on the CPU, for tensors of any strides.
#include <algorithm>

#include "common/error.h"
#include "common/memory.h"
#include "common/ops.h"
#include "common/tensor.h"
#include "cpu/parts.h"

namespace kvspn::cpu {
namespace {

int clamped(const kvspn_tensor& lengths, int64_t row, int64_t more, int64_t capacity) {
    const int64_t length = static_cast<const int32_t*>(lengths.data)[row * lengths.strides[0]];
    return int(std::clamp<int64_t>(length + more, 0, capacity));
}

}  // namespace

void flat_kv_attention(const kvspn_attention_params& p) {
    check(p);
    const int64_t heads = p.kv.shape[3], capacity = p.kv.shape[4];
    const int width = int(p.kv.shape[5]), layers = int(p.kv.shape[0]);
    const int64_t rows = p.q.shape[0], query_heads = p.q.shape[1], queries = p.q.shape[2];
    const int64_t tail = p.tail ? p.tail->shape[3] : 0, tasks = rows * query_heads;
    const int64_t *at = p.kv.strides, *q_at = p.q.strides, *out_at = p.out.strides;
    const size_t size = size_of(Dtype(p.kv.dtype));
    const Kernels& kernels = select_kernels(nullptr);
    const Parts parts(p.stream, tasks);
    const size_t score_count = size_t(kQueries) * (layers * pad(int(capacity)) + pad(int(tail)));
    const size_t float_count = size_t(2) * kQueries * width;
    const auto scores = scratch<float>(parts.count() * score_count);
    const auto floats = scratch<float>(parts.count() * float_count);
    const auto attend = [&](int64_t task, float* task_scores, float* task_floats) {
        const int64_t row = task / query_heads, query_head = task % query_heads;
        const int64_t head = query_head * heads / query_heads;
        const char* keys = static_cast<const char*>(p.kv.data) + (row * at[2] + head * at[3]) * int64_t(size);
        Attention a;
        a.dtype = Dtype(p.kv.dtype);
        a.keys = keys;
        a.values = keys + at[1] * int64_t(size);
        a.stride = at[4];
        a.layer_stride = at[0];
        a.layers = layers;
        a.width = width;
        a.scale = p.scale;
        a.scores = task_scores;
        if (p.kv_scale) {
            const int64_t* scale_at = p.kv_scale->strides;
            a.key_scales =
                static_cast<const float*>(p.kv_scale->data) + row * scale_at[2] + head * scale_at[3];
            a.value_scales = a.key_scales + scale_at[1];
            a.scale_layer_stride = scale_at[0];
        }
        if (p.tail) {
            const int64_t* tail_at = p.tail->strides;
            const char* tail_keys = static_cast<const char*>(p.tail->data) +
                                    (row * tail_at[1] + head * tail_at[2]) * int64_t(size);
            a.tail_keys = tail_keys;
            a.tail_values = tail_keys + tail_at[0] * int64_t(size);
            a.tail_stride = tail_at[3];
            a.tail_length = clamped(*p.tail_lengths, row, 0, tail);
        }
        for (int64_t first = 0; first < queries; first += kQueries) {
            a.queries = int(std::min<int64_t>(kQueries, queries - first));
            for (int i = 0; i < a.queries; ++i) {
                float* q = task_floats + i * width;
                const int64_t from = row * q_at[0] + query_head * q_at[1] + (first + i) * q_at[2];
                for (int c = 0; c < width; ++c) q[c] = element(p.q, from + c * q_at[3]);
                a.q[i] = q;
                a.out[i] = q + kQueries * width;
                a.lengths[i] = clamped(p.lengths, row, p.causal ? first + i + 1 : 0, capacity);
            }
            kernels.attend(a);
            for (int i = 0; i < a.queries; ++i) {
                const int64_t to = row * out_at[0] + (first + i) * out_at[1] + query_head * width * out_at[2];
                for (int c = 0; c < width; ++c)
                    store(Dtype(p.out.dtype), p.out.data, to + c * out_at[2], a.out[i][c]);
            }
        }
    };
    parts.run([&](int part) {
        for (int64_t task = tasks * part / parts.count(); task < tasks * (part + 1) / parts.count(); ++task)
            attend(task, scores.get() + part * score_count, floats.get() + part * float_count);
    });
}

}  // namespace kvspn::cpu
