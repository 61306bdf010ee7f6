// The ops of the C ABI on a CUDA device: checks, scratch memory, launches.

#include "common/ops.h"

#include <algorithm>
#include <new>

#include "common/error.h"
#include "common/tensor.h"
#include "cuda/op_kernels.h"

namespace kvspn::cuda {
namespace {

constexpr int kQueriesAtOnce = 16;

cudaStream_t handle_of(const kvspn_stream* stream) {
    require(stream, "stream must be given, got a null pointer");
    return static_cast<cudaStream_t>(stream->handle);
}

template <class T>
T* allocate(const kvspn_stream* stream, int64_t count) {
    require(stream->allocate, "stream->allocate must be given, got a null pointer");
    void* memory = stream->allocate(stream->context, count * int64_t(sizeof(T)));
    if (!memory) throw std::bad_alloc();
    return static_cast<T*>(memory);
}

template <class T>
T* allocate_zeros(const kvspn_stream* stream, int64_t count) {
    T* memory = allocate<T>(stream, count);
    check(cudaMemsetAsync(memory, 0, size_t(count) * sizeof(T), handle_of(stream)), "scratch memory");
    return memory;
}

// Whether every row of the last dimension, of `columns` elements, starts and ends at a multiple of `bytes`.
bool fits(const kvspn_tensor& tensor, int64_t columns, int bytes) {
    const int64_t size = int64_t(size_of(Dtype(tensor.dtype)));
    bool fits = reinterpret_cast<uintptr_t>(tensor.data) % bytes == 0 && columns * size % bytes == 0;
    for (int i = 0; i + 1 < tensor.ndim; ++i)
        fits &= tensor.shape[i] <= 1 || tensor.strides[i] * size % bytes == 0;
    return fits;
}
bool by_four(const kvspn_tensor& tensor) {
    return fits(tensor, tensor.shape[tensor.ndim - 1], int(4 * size_of(Dtype(tensor.dtype))));
}

// The widest unit of 16, 4, 2 or 1 bytes that rows of all tensors consist of.
int unit_of(std::initializer_list<const kvspn_tensor*> tensors) {
    for (int unit : {16, 4, 2}) {
        bool all = true;
        for (const kvspn_tensor* tensor : tensors)
            all &= fits(*tensor, tensor->shape[tensor->ndim - 1], unit);
        if (all) return unit;
    }
    return 1;
}

int lanes_of(const kvspn_tensor& kv) {
    const int64_t bytes = kv.shape[5] * int64_t(size_of(Dtype(kv.dtype)));
    require(bytes <= kMaxHeadBytes, "kv must have heads of at most ", kMaxHeadBytes, " bytes, got ", bytes);
    return cuda::lanes_of(bytes);
}

// The weights of a linear op or of verify, and the memory that a block needs for rows of x.
template <class Op>
void plan(const Device& device, int64_t rows, Op& op) {
    const kvspn_tensor &weight = op.p.weight, &scale = op.p.scale;
    const bool int4 = weight.dtype == KVSPN_INT4;
    const int64_t size = int64_t(size_of(Dtype(weight.dtype)));
    Stage& s = op.weights;
    s.dtype = Dtype(weight.dtype);
    s.weight = static_cast<const char*>(weight.data), s.scale = static_cast<const float*>(scale.data);
    s.pitch = weight.strides[0] * size;
    s.outputs = int(weight.shape[0]), s.inputs = int(op.p.x.shape[op.p.x.ndim - 1]);
    op.aligned = fits(weight, weight.shape[1], 16);
    op.by_four = by_four(op.p.x);
    op.norm_by_four = true;
    for (const kvspn_tensor* norm : {&op.p.norm_weight, &op.p.norm_bias})
        op.norm_by_four &= !norm->data || by_four(*norm);
    if (int4) {
        s.groups = int(scale.shape[1]);
        const int span = s.inputs / s.groups;
        while (1 << s.group_shift < span) ++s.group_shift;
        op.aligned &= span >= 8 && 1 << s.group_shift == span;
    }
    const int64_t columns = pad(std::max(s.inputs, 1), 32 * int(int4 ? 32 : 16 / size));
    const int64_t most = shared_floats_of_ops(device) - kMoments;
    require(columns <= most, "x must be at most ", most / 1024 * 1024, " columns wide on this device, got ",
            s.inputs);
    op.shared_floats = kMoments + int(std::min(std::min<int64_t>(rows, kTile) * columns, most));
}

KeyValues key_values(const kvspn_tensor& kv, int layers) {
    const int64_t* at = kv.strides + layers;
    return {kv.data, layers ? kv.strides[0] : 0, at[0], at[1], at[2], at[3], int32_t(kv.shape[layers + 3])};
}

}  // namespace

void flat_kv_attention(const kvspn_attention_params& p) {
    kvspn::check(p);
    const cudaStream_t stream = handle_of(p.stream);
    const int64_t rows = p.q.shape[0], queries = p.q.shape[2], heads = p.kv.shape[3], width = p.kv.shape[5];
    require(width <= 1 || p.q.strides[3] == 1, "q must be contiguous in its last dimension, got stride ",
            p.q.strides[3]);
    const int64_t layers = p.kv.shape[0];
    const int lanes = lanes_of(p.kv);
    if (!p.out.shape[0] || !p.out.shape[1] || !p.out.shape[2]) return;

    AttentionOp op{};
    op.q = p.q, op.out = p.out, op.dtype = Dtype(p.kv.dtype);
    op.lengths = static_cast<const int32_t*>(p.lengths.data);
    op.aligned = fits(p.kv, width, 16) && (!p.tail || fits(*p.tail, width, 16));
    op.by_four = by_four(p.q);
    Attention& a = op.attention;
    a.cache = key_values(p.kv, 1);
    if (p.kv_scale) a.scales = key_values(*p.kv_scale, 1);
    if (p.tail) {
        a.tail = key_values(*p.tail, 0);
        op.tail_lengths = static_cast<const int32_t*>(p.tail_lengths->data);
    }
    a.slots = int(rows), a.heads = int(heads), a.sharing = int(p.q.shape[1] / heads);
    a.width = int(width), a.layers = int(layers), a.lanes = lanes, a.causal = p.causal, a.scale = p.scale;
    const int split = 32 / a.lanes * loads_of(op.dtype);
    const auto splits_of = [&](int64_t positions) { return (positions + split - 1) / split; };
    const int64_t splits =
        splits_of(a.tail.capacity) + layers * std::max<int64_t>(1, splits_of(a.cache.capacity));
    const int64_t tasks = splits * rows * heads;
    require(tasks < (int64_t(1) << 30), "kv must have less than 2^30 blocks of positions, got ", tasks);
    const int64_t most = std::min<int64_t>(queries, kQueriesAtOnce);
    a.pitch = pitch_of_partial(width);
    a.partials = allocate<float>(p.stream, tasks * most * a.sharing * a.pitch);
    a.arrived = allocate_zeros<int32_t>(p.stream, rows * heads);
    const Device device = open_device_for_ops();
    for (int64_t first = 0; first < queries; first += most) {
        op.first = int(first), a.queries = int(std::min(most, queries - first));
        launch(device, op, stream);
    }
}

void fused_linear(const kvspn_linear_params& p) {
    kvspn::check(p);
    const cudaStream_t stream = handle_of(p.stream);
    if (!p.out.shape[0] || !p.out.shape[1]) return;
    const Device device = open_device_for_ops();
    LinearOp op{};
    op.p = p;
    plan(device, p.x.shape[0], op);
    launch(device, op, stream);
}

void lm_head_verify(const kvspn_verify_params& p) {
    kvspn::check(p);
    const cudaStream_t stream = handle_of(p.stream);
    const int64_t rows = p.x.shape[0] * p.x.shape[1];
    if (!rows) return;
    const Device device = open_device_for_ops();
    VerifyOp op{};
    op.p = p;
    plan(device, rows, op);
    op.best = allocate_zeros<uint64_t>(p.stream, 2 * rows + 1);  // the others behind it
    op.above = reinterpret_cast<int32_t*>(op.best + rows), op.arrived = op.above + rows;
    if (given(p.scores) || given(p.rules) || given(p.best_tokens))
        op.parts = allocate<Part>(p.stream, rows * kKinds * device.multiprocessors);
    if ((given(p.rules) && p.rules.shape[1] == kRuleWords) || given(p.best_tokens))
        op.kept = allocate<float>(p.stream, rows * p.weight.shape[0]);
    launch(device, op, stream);
}

void append_kv(const kvspn_append_params& p) {
    kvspn::check(p);
    const cudaStream_t stream = handle_of(p.stream);
    const int64_t* shape = p.k.shape;
    if (!shape[0] || !shape[1] || !shape[2] || !shape[3]) return;
    AppendOp op{};
    op.p = p;
    if (p.kv.dtype == KVSPN_INT8) {
        op.unit = 1, op.units = lanes_of(p.kv);
        op.aligned = fits(p.kv, shape[3], 16), op.by_four = by_four(p.k) && by_four(p.v);
    } else {
        op.unit = unit_of({&p.kv, &p.k, &p.v});
        op.units = int(shape[3] * int64_t(size_of(Dtype(p.kv.dtype))) / op.unit);
    }
    launch(open_device_for_ops(), op, stream);
}

void accept_and_rollback(const kvspn_accept_params& p) {
    kvspn::check(p);
    const cudaStream_t stream = handle_of(p.stream);
    if (p.tokens.shape[0]) launch_accept(open_device_for_ops(), p, stream);
}

namespace {

void compact(const kvspn_compact_params& p) {
    const cudaStream_t stream = handle_of(p.stream);
    const int64_t* shape = p.kv.shape;
    const int64_t moved = 2 * shape[0] * shape[2] * p.source.shape[1] * shape[3] * shape[5];
    if (!moved) return;
    char* held = allocate<char>(p.stream, moved * int64_t(size_of(Dtype(p.kv.dtype))));
    launch_compact(open_device_for_ops(), p, unit_of({&p.kv}), held, stream);
}

}  // namespace

void compact_kv(const kvspn_compact_params& p) {
    kvspn::check(p);
    compact(p);
    if (p.kv.dtype != KVSPN_INT8) return;
    kvspn_compact_params scales = p;  // a cache of one column
    scales.kv = p.kv_scale;
    scales.kv.ndim = 6, scales.kv.shape[5] = scales.kv.strides[5] = 1;
    compact(scales);
}

}  // namespace kvspn::cuda
