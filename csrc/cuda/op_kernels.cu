#include <algorithm>
#include <mutex>
#include <vector>

#include "cuda/attend.h"
#include "cuda/launch.h"
#include "cuda/op_kernels.h"
#include "cuda/verify.h"

namespace kvspn::cuda {
namespace {

constexpr int64_t kTallyBytes = (sizeof(Tally) + 15) / 16 * 16;

__device__ __forceinline__ float float_at(const kvspn_tensor& tensor, int64_t index) {
    return element(Table{Dtype(tensor.dtype), tensor.data, 0}, index);
}
__device__ __forceinline__ void put(const kvspn_tensor& tensor, int64_t index, float value) {
    with_float(Dtype(tensor.dtype),
               [&](auto type) { store(static_cast<decltype(type)*>(tensor.data) + index, value); });
}

template <class T>
struct alignas(4 * sizeof(T)) Four {
    T of[4];
};

// Elements `column` to column + 3 of a row of `columns` that begins at `start`.
__device__ __forceinline__ float4 four_at(const kvspn_tensor& tensor, int64_t start, int column,
                                          int64_t columns, bool by_four) {
    float4 out;
    with_float(Dtype(tensor.dtype), [&](auto type) {
        using T = decltype(type);
        const T* from = static_cast<const T*>(tensor.data) + start + column;
        Four<T> v{};
        if (by_four) {
            v = *reinterpret_cast<const Four<T>*>(from);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (column + i < columns) v.of[i] = from[i];
        }
        out = float4{to_float(v.of[0]), to_float(v.of[1]), to_float(v.of[2]), to_float(v.of[3])};
    });
    return out;
}

// x [.., Q, K] of a linear op or of verify.
template <class Op>
struct OpRows {
    const Op& op;
    __device__ __forceinline__ float4 four(int r, int column) const {
        const kvspn_tensor& x = op.p.x;
        const int queries = x.ndim == 3 ? int(x.shape[1]) : 1;
        const int64_t start = r / queries * x.strides[0] + r % queries * x.strides[x.ndim - 2];
        return four_at(x, start, column, op.weights.inputs, op.by_four);
    }
    __device__ __forceinline__ bool normed() const { return op.p.norm_weight.data; }
    __device__ __forceinline__ float4 norm_weight(int column) const {
        return four_at(op.p.norm_weight, 0, column, op.weights.inputs, op.norm_by_four);
    }
    __device__ __forceinline__ float4 norm_bias(int column) const {
        if (!op.p.norm_bias.data) return float4{0, 0, 0, 0};
        return four_at(op.p.norm_bias, 0, column, op.weights.inputs, op.norm_by_four);
    }
    __device__ __forceinline__ float eps() const { return op.p.eps; }
};

struct OpJudge {
    using Rules = OpJudge;
    static constexpr bool kListed = true;
    const VerifyOp& op;
    int queries;
    __device__ __forceinline__ int token(int n) const {
        return op.p.ids.data ? static_cast<const int32_t*>(op.p.ids.data)[n] : n;
    }
    __device__ __forceinline__ RowRule rule(int r) const {
        if (!ruled()) return {};
        const int32_t* words =
            static_cast<const int32_t*>(op.p.rules.data) + r / queries * op.p.rules.strides[0];
        return {words[0],
                as_float(uint32_t(words[1])),
                {uint32_t(words[2]), uint32_t(words[3])},
                words[4],
                words[5],
                words[6],
                words[7],
                op.p.rules.shape[1] > 8 ? words[8] : 0};
    }
    __device__ __forceinline__ int index(int r) const {
        if (!ruled()) return 0;
        const int32_t* lengths = static_cast<const int32_t*>(op.p.lengths.data);
        return lengths[r / queries * op.p.lengths.strides[0]] + r % queries + 1;
    }
    __device__ __forceinline__ float mask(int n, int r) const {
        const bool first = op.p.first_mask.data && index(r) == rule(r).first;
        const kvspn_tensor& from = first ? op.p.first_mask : op.p.mask;
        const int id = token(n);
        const bool outside = op.p.ids.data && (id < 0 || id >= from.shape[0]);
        return from.data && !outside ? static_cast<const float*>(from.data)[id] : 0.f;
    }
    __device__ __forceinline__ int query(int r) const { return r % queries; }
    __device__ __forceinline__ int text(int r, int at) const {
        const kvspn_tensor& tokens = op.p.tokens;
        if (at >= tokens.shape[1]) return -1;
        return static_cast<const int32_t*>(tokens.data)[r / queries * tokens.strides[0] + at];
    }
    __device__ __forceinline__ int drafted(int r, int i) const {
        return static_cast<const int32_t*>(op.p.draft.data)[r / queries * op.p.draft.strides[0] + i];
    }
    __device__ __forceinline__ bool ruled() const { return op.p.rules.data; }
    __device__ __forceinline__ bool scored() const { return op.p.scores.data; }
    __device__ __forceinline__ bool parted() const { return op.parts; }
    __device__ __forceinline__ int listed() const {
        return op.p.best_tokens.data ? int(op.p.best_tokens.shape[2]) : 0;
    }
    __device__ __forceinline__ void list(int r, int i, int n, float logit) const {
        const int64_t *at = op.p.best_tokens.strides, *logits = op.p.best_logits.strides;
        const int b = r / queries, q = r % queries;
        static_cast<int32_t*>(op.p.best_tokens.data)[b * at[0] + q * at[1] + i] = n < 0 ? n : token(n);
        static_cast<float*>(op.p.best_logits.data)[b * logits[0] + q * logits[1] + i] = logit;
    }
    __device__ __forceinline__ float* kept(int r) const {
        return listed() || is_cut(rule(r)) ? op.kept + int64_t(r) * op.weights.outputs : nullptr;
    }
    __device__ __forceinline__ float* score(int r) const {
        const int64_t* at = op.p.scores.strides;
        return static_cast<float*>(op.p.scores.data) + r / queries * at[0] + r % queries * at[1];
    }
    __device__ __forceinline__ int rows() const { return int(op.p.x.shape[0]) * queries; }
    __device__ __forceinline__ Part* part(int block, int kind, int r) const {
        return op.parts + (block * kKinds + kind) * rows() + r;
    }
    __device__ __forceinline__ float* draft_logit(int r) const { return score(r) + 2; }
    __device__ __forceinline__ int draft(int r) const {
        if (query(r) + 1 == queries) return -1;
        const int id = drafted(r, query(r));
        return id < op.weights.outputs ? id : -1;
    }
    __device__ __forceinline__ uint64_t* best(int r) const { return op.best + r; }
    __device__ __forceinline__ int32_t* above(int r) const { return op.above + r; }
};

struct OpPlace {
    static constexpr bool kTail = true;
    const AttentionOp& op;
    __device__ __forceinline__ int row(int slot) const { return slot; }
    __device__ __forceinline__ int length(int slot) const {
        const Attention& a = op.attention;
        return min(max(op.lengths[slot], -(1 << 30)), a.cache.capacity) + (a.causal ? op.first : 0);
    }
    __device__ __forceinline__ int tail_length(int slot) const {
        return op.tail_lengths ? min(max(op.tail_lengths[slot], 0), op.attention.tail.capacity) : 0;
    }
    __device__ __forceinline__ float4 four(int slot, int query, int head, int column) const {
        const int64_t* at = op.q.strides;
        const int64_t start = slot * at[0] + head * at[1] + (op.first + query) * at[2];
        return four_at(op.q, start, column, op.attention.width, op.by_four);
    }
    __device__ __forceinline__ void store(int slot, int query, int head, int column, float value) const {
        const int64_t* at = op.out.strides;
        const int64_t start = slot * at[0] + (op.first + query) * at[1];
        put(op.out, start + int64_t(head) * op.attention.width + column, value);
    }
    __device__ __forceinline__ void append(int, int, int, int) const {}
};

// Calls body(a weight, the rows of a tile, whether rows of weights are aligned) as constants.
template <class Body>
__device__ __forceinline__ void with_tile(Dtype dtype, bool aligned, int rows, Body body) {
    with_weight(dtype, [&](auto type) {
        using Many = std::integral_constant<int, kTile>;
        if (!aligned) return body(type, Many{}, std::false_type{});
        rows <= 2 ? body(type, std::integral_constant<int, 2>{}, std::true_type{})
                  : body(type, Many{}, std::true_type{});
    });
}

__global__ void __launch_bounds__(kThreads, 1) linear_kernel(const __grid_constant__ LinearOp op) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const kvspn_linear_params& p = op.p;
    const int rows = int(p.x.shape[0]);
    with_tile(op.weights.dtype, op.aligned, rows, [&](auto type, auto tile, auto aligned) {
        constexpr int R = decltype(tile)::value;
        auto start = [](int, int, int) {};
        auto begin = [&](int n, int r) {
            return Added{p.bias.data ? float_at(p.bias, n) : 0.f,
                         p.residual.data ? float_at(p.residual, r * p.residual.strides[0] + n) : 0.f};
        };
        auto end = [&](int n, int r, float value, const Added& added) {
            if (lane() % (32 / R)) return;
            if (p.bias.data) value += added.bias;
            if (p.gelu) value = 0.5f * value * (1.f + erff(value * 0.70710678f));
            if (p.residual.data) value += added.residual;
            put(p.out, r * p.out.strides[0] + n, value);
        };
        project<decltype(type), R, decltype(aligned)::value>(op.weights, OpRows<LinearOp>{op}, rows,
                                                             reinterpret_cast<float*>(shared_memory()),
                                                             op.shared_floats, start, begin, end);
    });
}

__global__ void __launch_bounds__(kThreads, 1) verify_kernel(const __grid_constant__ VerifyOp op) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const kvspn_verify_params& p = op.p;
    const int queries = int(p.x.shape[1]), rows = int(p.x.shape[0]) * queries;
    const OpJudge judge{op, queries};
    Tally& tally = *reinterpret_cast<Tally*>(shared_memory());
    with_tile(op.weights.dtype, op.aligned, rows, [&](auto type, auto tile, auto aligned) {
        verify<decltype(type), decltype(tile)::value, decltype(aligned)::value>(
            op.weights, OpRows<VerifyOp>{op}, judge, rows, tally,
            reinterpret_cast<float*>(shared_memory() + kTallyBytes), op.shared_floats);
    });
    // The last block to arrive writes the results.
    if (thread_index() == 0) {
        tally.draft[0] = add_acquire_release(op.arrived, 1) == block_count() - 1;
    }
    sync_block();
    if (!tally.draft[0]) return;
    settle_rows(judge, 0, rows, block_count(), op.weights.outputs, tally.meeting);
    for (int r = thread_index(); r < rows; r += thread_count()) {
        const int b = r / queries, j = r % queries;
        if (judge.scored() && judge.draft(r) < 0) *judge.draft_logit(r) = -INFINITY;
        const int chosen = id_of(fresh(op.best + r));
        static_cast<int32_t*>(p.argmax.data)[b * p.argmax.strides[0] + j] =
            chosen < 0 ? chosen : judge.token(chosen);
        if (j + 1 == queries) continue;
        static_cast<int32_t*>(p.rank.data)[b * p.rank.strides[0] + j] =
            chosen < 0 || judge.draft(r) < 0 ? KVSPN_K_INF : fresh(op.above + r);
    }
}

__global__ void __launch_bounds__(kThreads, 1) attention_kernel(const __grid_constant__ AttentionOp op) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    with_kv(op.dtype, [&](auto type) {
        using KV = decltype(type);
        op.aligned ? attend<KV, true>(op.attention, OpPlace{op})
                   : attend<KV, false>(op.attention, OpPlace{op});
    });
}

// Elements from the start of a cache [L, 2, B, H, S, D] to a position of one plane, 2 * layer + part.
__device__ __forceinline__ int64_t position_of(const kvspn_tensor& kv, int64_t plane, int64_t row,
                                               int64_t head, int64_t position) {
    return plane / 2 * kv.strides[0] + plane % 2 * kv.strides[1] + row * kv.strides[2] +
           head * kv.strides[3] + position * kv.strides[4];
}

__device__ __forceinline__ int64_t grid_thread() {
    return int64_t(block_index()) * thread_count() + thread_index();
}
__device__ __forceinline__ int64_t grid_threads() { return int64_t(block_count()) * thread_count(); }

__device__ __forceinline__ int32_t int_at(const kvspn_tensor& tensor, int64_t index) {
    return static_cast<const int32_t*>(tensor.data)[index];
}

// Unit by unit of a position's bytes; int8 is 16 columns a lane.
template <class Unit>
__global__ void append_kernel(const __grid_constant__ AppendOp op) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    constexpr bool kQuantise = std::is_same_v<Unit, int8_t>;
    const kvspn_append_params& p = op.p;
    const int64_t heads = p.kv.shape[3], queries = p.k.shape[2], width = p.kv.shape[5];
    const int64_t items = 2 * p.kv.shape[2] * heads * queries * op.units;
    // By whole warps, since the lanes of a position quantise it together.
    for (int64_t first = grid_thread() - lane(); first < items; first += grid_threads()) {
        const int64_t i = min(first + lane(), items - 1), unit = i % op.units, query = i / op.units % queries,
                      head = i / op.units / queries % heads, plane = i / op.units / queries / heads,
                      row = plane / 2, part = plane % 2, position = int_at(p.lengths, row) + query;
        const bool skipped = p.finished.data && static_cast<const bool*>(p.finished.data)[row];
        const bool written = first + lane() < items && position >= 0 && position < p.kv.shape[4] && !skipped;
        const kvspn_tensor& from = part ? p.v : p.k;
        const int64_t at = row * from.strides[0] + head * from.strides[1] + query * from.strides[2];
        const int64_t to = position_of(p.kv, 2 * p.layer + part, row, head, position);
        if constexpr (kQuantise) {
            const int column = int(16 * unit);
            float x[16] = {}, scale;
#pragma unroll
            for (int c = 0; c < 16; c += 4) {
                if (!written || column + c >= width) continue;
                const float4 v = four_at(from, at, column + c, width, op.by_four);
                x[c] = v.x, x[c + 1] = v.y, x[c + 2] = v.z, x[c + 3] = v.w;
            }
            const uint4 values = quantise(x, op.units, scale);
            if (!written) continue;
            int8_t* target = static_cast<int8_t*>(p.kv.data) + to + column;
            const uint32_t words[4] = {values.x, values.y, values.z, values.w};
            if (op.aligned && column < width) *reinterpret_cast<uint4*>(target) = values;
#pragma unroll
            for (int c = 0; c < 16; ++c)
                if (!op.aligned && column + c < width) target[c] = int8_t(words[c / 4] >> 8 * (c % 4));
            const int64_t* strides = p.kv_scale.strides;
            if (unit == 0)
                static_cast<float*>(p.kv_scale.data)[p.layer * strides[0] + part * strides[1] +
                                                     row * strides[2] + head * strides[3] + position] = scale;
        } else if (written) {
            const int64_t size = int64_t(sizeof(Unit)) * op.units / width;
            reinterpret_cast<Unit*>(static_cast<char*>(p.kv.data) + to * size)[unit] =
                reinterpret_cast<const Unit*>(static_cast<const char*>(from.data) + at * size)[unit];
        }
    }
}

// One thread a row.
struct OpRow {
    const kvspn_accept_params& p;
    int64_t b;
    __device__ __forceinline__ int32_t draft(int i) const {
        return int_at(p.draft, b * p.draft.strides[0] + i);
    }
    __device__ __forceinline__ int32_t rank(int i) const { return int_at(p.rank, b * p.rank.strides[0] + i); }
    __device__ __forceinline__ int32_t choice(int i) const {
        return int_at(p.argmax, b * p.argmax.strides[0] + i);
    }
    __device__ __forceinline__ void emit(int i, int64_t at, int32_t token) const {
        if (at < 0) return;
        static_cast<int32_t*>(p.tokens.data)[b * p.tokens.strides[0] + at] = token;
        if (!p.scores.data) return;
        const float* scores =
            static_cast<const float*>(p.scores.data) + b * p.scores.strides[0] + i * p.scores.strides[1];
        const bool drafted = i < p.draft.shape[1] && draft(i) == token;
        static_cast<float*>(p.log_probs.data)[b * p.log_probs.strides[0] + at] =
            scores[drafted ? 2 : 1] - scores[0];
    }
};

__global__ void accept_kernel(const __grid_constant__ kvspn_accept_params p) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const StopRule rule{p.k, p.eos, p.max_length};
    bool* finished = static_cast<bool*>(p.finished.data);
    int32_t* lengths = static_cast<int32_t*>(p.lengths.data);
    for (int64_t b = grid_thread(); b < p.tokens.shape[0]; b += grid_threads()) {
        if (finished[b]) continue;
        int32_t* stats = static_cast<int32_t*>(p.stats.data) + b * p.stats.strides[0];
        finished[b] = accept(OpRow{p, b}, int32_t(p.draft.shape[1]), rule, lengths[b], stats);
    }
}

// All that moves goes to `held`, and in a second launch (kWrite) from there to its place.
template <class Unit, bool kWrite>
__global__ void compact_kernel(const __grid_constant__ kvspn_compact_params p, const int size, Unit* held) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int64_t rows = p.kv.shape[2], heads = p.kv.shape[3], capacity = p.kv.shape[4];
    const int64_t moves = p.source.shape[1], units = p.kv.shape[5] * size / sizeof(Unit);
    for (int64_t i = grid_thread(); i < 2 * p.kv.shape[0] * rows * moves * heads * units;
         i += grid_threads()) {
        const int64_t unit = i % units, head = i / units % heads, move = i / units / heads % moves;
        const int64_t row = i / units / heads / moves % rows, plane = i / units / heads / moves / rows;
        const int64_t parent = int_at(p.rows, row),
                      source = int_at(p.source, row * p.source.strides[0] + move);
        const int64_t target = int_at(p.start, row) + move;
        if (parent < 0 || parent >= rows || source < 0 || source >= capacity) continue;
        if (target < 0 || target >= capacity) continue;
        const int64_t at = kWrite ? position_of(p.kv, plane, row, head, target)
                                  : position_of(p.kv, plane, parent, head, source);
        Unit* in_cache = reinterpret_cast<Unit*>(static_cast<char*>(p.kv.data) + at * size) + unit;
        kWrite ? * in_cache = held[i] : held[i] = *in_cache;
    }
}

template <class Body>
void with_unit(int bytes, Body body) {
    switch (bytes) {
        case 16:
            return body(uint4{});
        case 4:
            return body(uint32_t{});
        case 2:
            return body(uint16_t{});
        default:
            return body(int8_t{});
    }
}

int size_of_element(const kvspn_tensor& tensor) {
    return tensor.dtype == KVSPN_FP32 ? 4 : tensor.dtype == KVSPN_INT8 ? 1 : 2;
}

// Blocks for one thread an item, several of which share a multiprocessor.
Grid grid_for(const Device& device, int64_t items) {
    return {
        int(std::min<int64_t>((items + device.threads - 1) / device.threads, device.multiprocessors * 8))};
}

}  // namespace

Device open_device_for_ops() {
    static std::mutex mutex;
    static std::vector<int> opened;
    const Device device = present_device();
    std::lock_guard<std::mutex> lock(mutex);
    if (std::find(opened.begin(), opened.end(), device.index) == opened.end()) {
        allow_shared("fused_linear", pointer(&linear_kernel), device.shared_bytes);
        allow_shared("lm_head_verify", pointer(&verify_kernel), device.shared_bytes);
        opened.push_back(device.index);
    }
    return device;
}

int shared_floats_of_ops(const Device& device) { return int((device.shared_bytes - kTallyBytes) / 4); }

void launch(const Device& device, const LinearOp& op, cudaStream_t stream) {
    launch("fused_linear", device, &linear_kernel, {device.multiprocessors, 4 * op.shared_floats}, stream,
           op);
}

void launch(const Device& device, const VerifyOp& op, cudaStream_t stream) {
    launch("lm_head_verify", device, &verify_kernel,
           {device.multiprocessors, 4 * op.shared_floats + int(kTallyBytes)}, stream, op);
}

void launch(const Device& device, const AttentionOp& op, cudaStream_t stream) {
    launch("flat_kv_attention", device, &attention_kernel, {device.multiprocessors}, stream, op);
}

void launch(const Device& device, const AppendOp& op, cudaStream_t stream) {
    const int64_t* shape = op.p.k.shape;
    const Grid grid = grid_for(device, 2 * shape[0] * shape[1] * shape[2] * op.units);
    with_unit(op.unit, [&](auto type) {
        launch("append_kv", device, &append_kernel<decltype(type)>, grid, stream, op);
    });
}

void launch_accept(const Device& device, const kvspn_accept_params& p, cudaStream_t stream) {
    launch("accept_and_rollback", device, &accept_kernel, grid_for(device, p.tokens.shape[0]), stream, p);
}

void launch_compact(const Device& device, const kvspn_compact_params& p, int unit, char* held,
                    cudaStream_t stream) {
    const int64_t* shape = p.kv.shape;
    const int size = size_of_element(p.kv);
    const int64_t items = 2 * shape[0] * shape[2] * p.source.shape[1] * shape[3] * shape[5] * size / unit;
    with_unit(unit, [&](auto type) {
        using Unit = decltype(type);
        Unit* memory = reinterpret_cast<Unit*>(held);
        const Grid grid = grid_for(device, items);
        launch("compact_kv", device, &compact_kernel<Unit, false>, grid, stream, p, size, memory);
        launch("compact_kv", device, &compact_kernel<Unit, true>, grid, stream, p, size, memory);
    });
}

}  // namespace kvspn::cuda
