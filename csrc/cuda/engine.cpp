#include "cuda/engine.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "common/batch.h"
#include "common/error.h"
#include "common/ops.h"

namespace kvspn {
namespace cuda {

Buffer::Buffer(size_t bytes, cudaStream_t stream) {
    check(cudaMalloc(&data_, std::max<size_t>(bytes, 16)), "device memory");
    check(cudaMemsetAsync(data_, 0, bytes, stream), "device memory");
}

Buffer::Buffer(const void* from, size_t bytes, cudaStream_t stream) {
    check(cudaMalloc(&data_, std::max<size_t>(bytes, 16)), "device memory");
    check(cudaMemcpyAsync(data_, from, bytes, cudaMemcpyHostToDevice, stream), "device memory");
}

OnDevice::OnDevice(int index) {
    check(cudaGetDevice(&before_), "the device");
    if (before_ != index) check(cudaSetDevice(index), "the device");
}

OnDevice::~OnDevice() { cudaSetDevice(before_); }

Stream::Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream"); }

Pinned::Pinned(size_t bytes) {
    check(cudaMallocHost(&data_, bytes), "pinned memory");
    std::memset(data_, 0, bytes);
}

template <class Body>
void Graph::launch(Body capture, cudaStream_t on) {
    if (!exec_) {
        const Stream stream;  // the default stream cannot be captured
        cudaGraph_t graph;
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "the step's graph");
        capture(stream);
        check(cudaStreamEndCapture(stream, &graph), "the step's graph");
        check(cudaGraphInstantiate(&exec_, graph, 0), "the step's graph");
        cudaGraphDestroy(graph);
    }
    check(cudaGraphLaunch(exec_, on), "the step's graph");
}

void Graph::reset() {
    if (exec_) cudaGraphExecDestroy(exec_);
    exec_ = nullptr;
}

}  // namespace cuda

using cuda::Buffer;
using cuda::Kind;
using cuda::Stage;

namespace {

// Bytes of an output's weights, and their scales.
int64_t pitch_of(const Matrix& matrix) {
    return int64_t(matrix.columns) * int64_t(size_of(matrix.dtype)) / (matrix.dtype == Dtype::int4 ? 2 : 1);
}
int groups_of(const Matrix& matrix) { return matrix.dtype == Dtype::int4 ? matrix.inputs / matrix.span : 1; }

}  // namespace

const char* instruction_set() {
#if defined(KVSPN_EMULATE)
    return "cuda, emulated";
#else
    return "cuda";
#endif
}

Engine::Engine(const kvspn_engine_params& params, const kvspn_tensor* weights, int count)
    : weights_(params, weights, count, Layout::rows) {
    const char* mode = std::getenv("KVSPN_CUDA_STEP");
    const std::string name = mode ? mode : "persistent";
    require(name == "persistent" || name == "graph" || name == "kernels",
            "KVSPN_CUDA_STEP must be persistent, graph or kernels, got ", name);
    mode_ = name == "persistent" ? Mode::persistent : name == "graph" ? Mode::graph : Mode::kernels;
    device_ = cuda::open_device();

    const cuda::Stream stream;  // beside what others do on the default stream
    stream_ = stream;
    Weights& w = weights_;
    int hidden = w.width, query = 3 * w.width;
    const auto widest = [](int& widest, const Matrix& matrix) { widest = std::max(widest, matrix.outputs); };
    model_.tokens = upload(w.tokens), model_.positions = upload(w.positions);
    vocabulary_ = w.vocabulary;
    w.norm = upload(w.norm);
    const bool own_head = w.draft_head.weight && w.draft_head.weight != w.head.weight;
    w.head = upload(w.head);
    w.draft_head = own_head ? upload(w.draft_head) : w.head;
    for (Layer& layer : w.layers) {
        for (Norm* norm : {&layer.self_norm, &layer.cross_norm, &layer.ffn_norm}) *norm = upload(*norm);
        for (Matrix* matrix : {&layer.self_qkv, &layer.self_out, &layer.cross_q, &layer.cross_kv,
                               &layer.cross_out, &layer.fc1, &layer.fc2})
            *matrix = upload(*matrix);
        widest(hidden, layer.fc1);
    }
    for (Block& block : w.blocks) {
        for (Norm* norm : {&block.kv_norm, &block.cross_norm, &block.ffn_norm}) *norm = upload(*norm);
        for (Matrix* matrix :
             {&block.kv_q, &block.kv_out, &block.cross_q, &block.cross_out, &block.fc1, &block.fc2})
            *matrix = upload(*matrix);
        widest(hidden, block.fc1), widest(query, block.kv_q), widest(query, block.cross_q);
    }
    if (!w.blocks.empty()) w.draft_norm = upload(w.draft_norm);
    if (w.draft_ids)
        model_.draft_ids =
            keep(Buffer(w.draft_ids, size_t(w.draft_head.outputs) * sizeof(int32_t), stream_)).as<int32_t>();
    hidden_stride_ = pad(hidden), query_stride_ = pad(query);
    model_.x_stride = pad(w.width);
    model_.width = w.width, model_.heads = w.heads, model_.head_dim = w.head_dim;
    model_.encoder_stride = w.encoder_stride;
    // The host's copies have arrived, and go.
    wait("the weights");
    w.release();
    stream_ = nullptr;
}

Engine::~Engine() {
    // Kernels that still run use what goes now, and whose stream it was may be gone.
    const cuda::OnDevice here(device_.index);
    cudaDeviceSynchronize();
}

Buffer& Engine::keep(Buffer buffer) {
    weight_memory_.push_back(std::move(buffer));
    return weight_memory_.back();
}

const float* Engine::upload(const float* values, int count) {
    return values ? keep(Buffer(values, size_t(count) * sizeof(float), stream_)).as<float>() : nullptr;
}

Matrix Engine::upload(const Matrix& matrix) {
    Matrix copy = matrix;
    if (!matrix.weight) return copy;
    copy.weight = keep(Buffer(matrix.weight, size_t(matrix.outputs * pitch_of(matrix)), stream_)).as<void>();
    copy.scale = upload(matrix.scale, matrix.outputs * groups_of(matrix));
    copy.bias = upload(matrix.bias, matrix.outputs);
    return copy;
}

Norm Engine::upload(const Norm& norm) {
    return {upload(norm.weight, weights_.width), upload(norm.bias, weights_.width)};
}

cuda::Table Engine::upload(const Table& table) {
    const size_t bytes = size_t(table.count) * table.width * size_of(table.dtype);
    return {table.dtype, keep(Buffer(table.rows, bytes, stream_)).as<void>(), table.count};
}

void Engine::bind(const kvspn_batch& b) {
    const cuda::OnDevice here(device_.index);
    const auto [rows, capacity, cross, ids] = check_batch(b, weights_);
    require(rows <= cuda::kMaxBatch, "kv must have at most ", cuda::kMaxBatch, " rows, got ", rows);
    const int64_t head_bytes = weights_.head_dim * int64_t(size_of(Dtype(b.kv.dtype)));
    require(head_bytes % 16 == 0 && head_bytes <= cuda::kMaxHeadBytes, "kv must have heads of 16 to ",
            cuda::kMaxHeadBytes, " bytes, a multiple of 16, got ", head_bytes);
    for (auto& [name, tensor] : {std::pair<const char*, const kvspn_tensor*>{"kv", &b.kv},
                                 {"cross_kv", &b.cross_kv},
                                 {"kv_scale", b.kv_scale},
                                 {"cross_kv_scale", b.cross_kv_scale}})
        require(!tensor || reinterpret_cast<uintptr_t>(tensor->data) % 16 == 0, name,
                " must start at a multiple of 16 bytes, got another address");

    // Kernels that still run use what is replaced now, the pinned memory too.
    cuda::check(cudaDeviceSynchronize(), "bind");
    model_.kv_dtype = Dtype(b.kv.dtype);
    model_.lengths = static_cast<int32_t*>(b.lengths.data);
    model_.ids = static_cast<int32_t*>(b.tokens.data);
    model_.stats = static_cast<int32_t*>(b.stats.data);
    model_.cross_lengths = static_cast<const int32_t*>(b.cross_lengths.data);
    model_.finished = static_cast<bool*>(b.finished.data);
    model_.batch = int(rows), model_.capacity = int(capacity), model_.id_capacity = int(ids);
    batch_ = b;
    kv_scale_ = b.kv_scale ? *b.kv_scale : kvspn_tensor{};
    cross_kv_scale_ = b.cross_kv_scale ? *b.cross_kv_scale : kvspn_tensor{};

    const size_t queries = std::max<size_t>(kPrefillChunk, 2 * rows), slots = rows;
    const auto zeros = [&](size_t bytes) { return Buffer(bytes, stream_); };
    x_ = zeros(queries * model_.x_stride * sizeof(float));
    wide_ = zeros(queries * query_stride_ * sizeof(float));
    attended_ = zeros(queries * query_stride_ * sizeof(float));
    hidden_ = zeros(queries * hidden_stride_ * sizeof(float));
    best_ = zeros(queries * sizeof(uint64_t)), draft_best_ = zeros(slots * sizeof(uint64_t));
    above_ = zeros(queries * sizeof(int32_t)), arrived_ = zeros(slots * weights_.heads * sizeof(int32_t));
    barrier_ = zeros(sizeof(uint32_t)), control_ = zeros(sizeof(cuda::Control));
    states_ = zeros(size_t(cross * model_.x_stride) * sizeof(float));
    const int64_t projected = b.kv.dtype == KVSPN_INT8 ? cross * 2 * weights_.width : 0;
    projected_ = zeros(size_t(projected) * sizeof(float));
    model_.x = x_.as<float>();
    model_.best = best_.as<uint64_t>(), model_.draft_best = draft_best_.as<uint64_t>();
    model_.above = above_.as<int32_t>(), model_.arrived = arrived_.as<int32_t>();
    model_.barrier = barrier_.as<uint32_t>(), model_.control = control_.as<cuda::Control>();
    progress_ = cuda::Pinned(size_t(rows) * (1 + ids) * sizeof(int32_t));
    model_.progress = progress_.as<int32_t>();
    prefilled_.assign(size_t(rows), 0);
    controlled_ = false;
    for (cuda::Graph& graph : graphs_) graph.reset();
    plan();
}

// The stages of a step on the present batch, and the memory that they need.
void Engine::plan() {
    const Weights& w = weights_;
    float *x = x_.as<float>(), *wide = wide_.as<float>(), *attended = attended_.as<float>(),
          *hidden = hidden_.as<float>();
    const int layers = int(w.layers.size()), blocks = int(w.blocks.size());
    auto attention = [&](const char* const(&names)[3], const Norm& norm, const Matrix& q, const Matrix& out,
                         bool cross, int layer, int count) {
        add_linear(names[0], &norm, x, model_.x_stride, q, wide, query_stride_, false, false);
        add_attend(names[1], cross, layer, count, q.outputs / w.head_dim, false);
        add_linear(names[2], nullptr, attended, query_stride_, out, x, model_.x_stride, false, true);
    };
    auto feed_forward = [&](const char* const(&names)[2], const Norm& norm, const Matrix& fc1,
                            const Matrix& fc2) {
        add_linear(names[0], &norm, x, model_.x_stride, fc1, hidden, hidden_stride_, true, false);
        add_linear(names[1], nullptr, hidden, hidden_stride_, fc2, x, model_.x_stride, false, true);
    };

    constexpr const char *kSelf[] = {"draft.kv_q", "draft.kv_attention", "draft.kv_out"},
                         *kDraftCross[] = {"draft.cross_q", "draft.cross_attention", "draft.cross_out"},
                         *kCross[] = {"cross_q", "cross_attention", "cross_out"},
                         *kDraftFfn[] = {"draft.fc1", "draft.fc2"}, *kFfn[] = {"fc1", "fc2"};
    stages_.clear();
    drafting_ = true;
    if (blocks) add_embed(true);
    for (int i = 0; i < blocks; ++i) {
        const Block& block = w.blocks[i];
        const int size = layers / w.groups, end = (i * w.groups / blocks + 1) * size,
                  count = w.last_layer_only ? 1 : size;
        attention(kSelf, block.kv_norm, block.kv_q, block.kv_out, false, end - count, count);
        if (block.cross)
            attention(kDraftCross, block.cross_norm, block.cross_q, block.cross_out, true, end - 1, 1);
        feed_forward(kDraftFfn, block.ffn_norm, block.fc1, block.fc2);
    }
    if (blocks) add_verify(true, w.draft_norm, w.draft_head);
    drafting_ = false;
    base_ = int(stages_.size());
    add_embed(false);
    for (int i = 0; i < layers; ++i) {
        const Layer& layer = w.layers[i];
        add_linear("self_qkv", &layer.self_norm, x, model_.x_stride, layer.self_qkv, wide, query_stride_,
                   false, false);
        if (model_.kv_dtype != Dtype::int8) {
            Stage& s = stages_.back();
            s.kv = layer_kv(false, i), s.kept = w.width, s.capacity = model_.capacity;
        }
        add_attend("self_attention", false, i, 1, w.heads, true);
        add_linear("self_out", nullptr, attended, query_stride_, layer.self_out, x, model_.x_stride, false,
                   true);
        attention(kCross, layer.cross_norm, layer.cross_q, layer.cross_out, true, i, 1);
        feed_forward(kFfn, layer.ffn_norm, layer.fc1, layer.fc2);
    }
    judge_ = int(stages_.size());
    add_verify(false, w.norm, w.head);
    stages_.emplace_back();
    stages_.back().kind = Kind::accept, stages_.back().name = "accept";

    model_.partial_pitch = cuda::pitch_of_partial(w.head_dim);
    size_t partials = 0;
    int longest = 0;  // row of activations, in a block's memory
    for (const Stage& stage : stages_) {
        if (stage.kind == Kind::attend) {
            const size_t split = size_t(32 / stage.lanes * cuda::loads_of(stage.dtype));
            const size_t splits = stage.layers * ((stage.capacity + split - 1) / split);
            const size_t queries = std::max<size_t>(kPrefillChunk, 2 * model_.batch);
            partials = std::max(partials, splits * queries * stage.query_heads * model_.partial_pitch);
        } else {
            longest = std::max(longest, pad(stage.inputs, 1024));
        }
    }
    partials_ = Buffer(partials * sizeof(float), stream_);
    model_.partials = partials_.as<float>();
    model_.shared_floats = cuda::shared_floats(device_, int(stages_.size()));
    const int room = model_.shared_floats - cuda::kMoments;
    require(longest <= room, "weights must be at most ", room / 1024 * 1024,
            " columns wide on this device, got ", longest);
    plan_ = Buffer(stages_.data(), stages_.size() * sizeof(Stage), stream_);
}

void Engine::add_embed(bool draft) {
    stages_.emplace_back();
    stages_.back().kind = Kind::embed, stages_.back().draft = draft;
    stages_.back().name = draft ? "draft.embed" : "embed";
}

void Engine::add_linear(const char* name, const Norm* norm, const float* x, int64_t x_stride,
                        const Matrix& matrix, float* y, int64_t y_stride, bool gelu, bool accumulate) {
    Stage s;
    s.name = name, s.kind = Kind::linear, s.dtype = matrix.dtype, s.draft = drafting_;
    s.x = x, s.x_stride = x_stride, s.y = y, s.y_stride = y_stride;
    if (norm) s.norm_weight = norm->weight, s.norm_bias = norm->bias;
    s.weight = static_cast<const char*>(matrix.weight), s.scale = matrix.scale, s.bias = matrix.bias;
    s.pitch = pitch_of(matrix), s.groups = groups_of(matrix);
    while (1 << s.group_shift < matrix.span) ++s.group_shift;
    s.inputs = matrix.inputs, s.outputs = matrix.outputs, s.gelu = gelu, s.accumulate = accumulate;
    stages_.push_back(s);
}

void Engine::add_attend(const char* name, bool cross, int layer, int layers, int query_heads, bool causal) {
    Stage s;
    s.name = name, s.kind = Kind::attend, s.dtype = model_.kv_dtype, s.draft = drafting_;
    s.x = wide_.as<float>(), s.y = attended_.as<float>(), s.x_stride = s.y_stride = query_stride_;
    s.kv = layer_kv(cross, layer), s.kv_scale = layer_scale(cross, layer), s.layers = layers;
    s.capacity = int((cross ? batch_.cross_kv : batch_.kv).shape[4]), s.query_heads = query_heads;
    s.causal = causal, s.cross = cross;
    s.lanes = cuda::lanes_of(weights_.head_dim * int64_t(size_of(model_.kv_dtype)));
    stages_.push_back(s);
}

void Engine::add_verify(bool draft, const Norm& norm, const Matrix& head) {
    add_linear(draft ? "draft.head" : "head", &norm, x_.as<float>(), model_.x_stride, head, nullptr, 0, false,
               false);
    stages_.back().kind = Kind::verify, stages_.back().draft = draft;
}

void Engine::encode(int row, const kvspn_tensor& states) {
    const cuda::OnDevice here(device_.index);
    check_row(row);
    check_tensor("states", states, {Dtype::fp32, Dtype::bf16, Dtype::fp16}, {-1, weights_.width});
    const int64_t capacity = batch_.cross_kv.shape[4], count = states.shape[0];
    require(count >= 1 && count <= capacity, "states must hold 1 to ", capacity, " positions, got ", count);
    const bool int8 = model_.kv_dtype == Dtype::int8;
    float* x = states_.as<float>();
    int32_t* length = static_cast<int32_t*>(batch_.cross_lengths.data) + row;
    cuda::check(cudaMemsetAsync(length, 0, sizeof *length, stream_), "encode");
    int64_t at = 0;  // the draft network's positions come first
    for (int first = 0, stride = weights_.encoder_stride; first < std::min<int64_t>(stride, count); ++first) {
        const kvspn_tensor rows = every(stride, first, states);
        cuda::launch_to_float(device_, {Dtype(rows.dtype), rows.data, int32_t(rows.shape[0])}, weights_.width,
                              rows.strides[0], rows.strides[1], x + at * model_.x_stride, model_.x_stride,
                              stream_);
        at += rows.shape[0];
    }
    for (int i = 0; i < int(weights_.layers.size()); ++i) {
        add_linear("cross_kv", nullptr, x, model_.x_stride, weights_.layers[i].cross_kv,
                   projected_.as<float>(), 2 * weights_.width, false, false);
        Stage stage = stages_.back();
        stages_.pop_back();
        if (!int8) stage.kv = layer_kv(true, i), stage.capacity = int(capacity);
        cuda::launch_stage(device_, model_, stage, {row, 0, int32_t(count)}, stream_);
        if (int8) append_cross(i, row, count);
    }
    set(length, int32_t(count));
    wait("encode");
}

// Keys and values [E, 2, H, D] of one layer, the first of a row, to a cache of int8.
void Engine::append_cross(int layer, int row, int64_t count) {
    const int64_t heads = weights_.heads, head_dim = weights_.head_dim, width = weights_.width;
    const kvspn_stream stream{stream_, nullptr, nullptr, nullptr, 0};
    float* made = projected_.as<float>();
    kvspn_append_params p{};
    p.kv = batch_.cross_kv, p.kv_scale = cross_kv_scale_;
    p.kv.data = static_cast<int8_t*>(p.kv.data) + row * p.kv.strides[2];
    p.kv_scale.data = static_cast<float*>(p.kv_scale.data) + row * p.kv_scale.strides[2];
    p.kv.shape[2] = p.kv_scale.shape[2] = 1;
    p.k = {"k", made, KVSPN_FP32, 4, {1, heads, count, head_dim}, {0, head_dim, 2 * width, 1}};
    p.v = p.k, p.v.name = "v", p.v.data = made + width;
    p.lengths = batch_.cross_lengths;
    p.lengths.data = static_cast<int32_t*>(p.lengths.data) + row, p.lengths.shape[0] = 1;
    p.layer = layer, p.stream = &stream;
    append_kv(p);
}

void Engine::prefill(int row, int count) {
    const cuda::OnDevice here(device_.index);
    check_row(row);
    const int limit = std::min({model_.capacity, model_.id_capacity, model_.positions.count});
    require(count >= 0 && count <= limit, "count must be 0 to ", limit, ", got ", count);
    for (int first = 0; first < count; first += kPrefillChunk)
        launch_stages(base_, judge_, {row, first, std::min(kPrefillChunk, count - first)}, stream_);
    set(model_.lengths + row, count);
    wait("prefill");
    prefilled_[row] = count;
    model_.progress[int64_t(row) * (1 + model_.id_capacity)] = 0;
}

void Engine::check_bound() const { require(model_.batch, "a batch must be bound first, got none"); }

void Engine::check_row(int row) const {
    check_bound();
    require(row >= 0 && row < model_.batch, "row must be 0 to ", model_.batch - 1, ", got ", row);
}

void Engine::check_step(const kvspn_step_params& params) const {
    check_bound();
    require(params.k >= 1, "k must be at least 1, got ", params.k);
    require(params.eos >= -1, "eos must be at least -1, got ", params.eos);
    const int limit = std::min({model_.capacity, model_.id_capacity, model_.positions.count});
    require(params.max_length >= 1 && params.max_length <= limit, "max_length must be 1 to ", limit, ", got ",
            params.max_length);
    require(!params.draft || !weights_.blocks.empty(), "draft must be 0 without draft blocks, got 1");
}

void Engine::generate(const kvspn_generate_params& params) {
    const cuda::OnDevice here(device_.index);
    check_step(params.step);
    require(params.max_steps >= 0, "max_steps must be at least 0, got ", params.max_steps);
    int left = params.max_steps ? params.max_steps : params.step.max_length;  // each makes a token
    kvspn_step_params first = params.step;
    if (params.first_mask) first.mask = params.first_mask, first.draft = 0;
    if (!params.on_step) {
        if (params.first_mask) run(first, 1), --left;
        return run(params.step, left);
    }
    std::vector<uint8_t> finished;
    for (int n = 0; n < left; ++n) {
        finished.resize(size_t(model_.batch));  // of what on_step may have bound
        fetch(finished.data(), model_.finished, finished.size());
        if (!std::count(finished.begin(), finished.end(), 0)) return;
        run(n ? params.step : first, 1);
        wait("decoder_step");
        for (int row = 0; row < model_.batch; ++row)
            if (!finished[row]) check_tokens(row);
        if (params.on_step(params.context)) return;
    }
}

void Engine::rollback(int row, int length) {
    const cuda::OnDevice here(device_.index);
    check_row(row);
    int32_t present;
    fetch(&present, model_.lengths + row, sizeof present);
    present = std::min(present, model_.capacity);
    require(length >= 0 && length <= present, "length must be 0 to ", present, ", got ", length);
    set(model_.lengths + row, length);
    cuda::check(cudaMemsetAsync(model_.finished + row, 0, sizeof(bool), stream_), "rollback");
    int32_t& shown = model_.progress[int64_t(row) * (1 + model_.id_capacity)];
    shown = std::min(shown, length + 1);
}

void Engine::reset() {
    const cuda::OnDevice here(device_.index);
    check_bound();
    const size_t rows = size_t(model_.batch);
    cuda::check(cudaMemsetAsync(model_.lengths, 0, rows * sizeof(int32_t), stream_), "reset");
    cuda::check(cudaMemsetAsync(batch_.cross_lengths.data, 0, rows * sizeof(int32_t), stream_), "reset");
    cuda::check(cudaMemsetAsync(model_.finished, 1, rows * sizeof(bool), stream_), "reset");
    cuda::check(cudaMemsetAsync(model_.stats, 0, 3 * rows * sizeof(int32_t), stream_), "reset");
    wait("reset");
    for (size_t row = 0; row < rows; ++row)
        prefilled_[row] = model_.progress[row * (1 + model_.id_capacity)] = 0;
}

void Engine::read_statistics(int row, kvspn_statistics& statistics) const {
    const cuda::OnDevice here(device_.index);
    if (row == -1)
        check_bound();
    else
        check_row(row);
    std::vector<int32_t> lengths(size_t(model_.batch)), stats(3 * lengths.size());
    fetch(lengths.data(), model_.lengths, lengths.size() * sizeof(int32_t));
    fetch(stats.data(), model_.stats, stats.size() * sizeof(int32_t));
    for (int r = 0; r < model_.batch; ++r) check_tokens(r);
    statistics = {sizeof statistics, 0, 0, 0, 0};
    for (int r = row == -1 ? 0 : row; r < (row == -1 ? model_.batch : row + 1); ++r) {
        statistics.tokens += std::max<int64_t>(int64_t(lengths[r]) - prefilled_[r], 0);
        statistics.steps += stats[3 * r];
        statistics.drafted += stats[3 * r + 1];
        statistics.accepted += stats[3 * r + 2];
    }
}

// What a step that nobody waited for has left: -1 as a row's newest token.
void Engine::check_tokens(int row) const {
    const volatile int32_t* from = model_.progress + int64_t(row) * (1 + model_.id_capacity);
    const int count = *from;
    std::atomic_thread_fence(std::memory_order_acquire);
    if (count && from[count] < 0) throw NoToken(row, count - 2);
}

int Engine::progress(int row, int32_t* tokens, int capacity) const {
    check_row(row);
    check_tokens(row);
    const volatile int32_t* from = model_.progress + int64_t(row) * (1 + model_.id_capacity);
    const int first = prefilled_[row] + 1, count = std::max(int(*from) - first, 0);
    std::atomic_thread_fence(std::memory_order_acquire);
    for (int i = 0; i < std::min(count, capacity); ++i) tokens[i] = from[1 + first + i];
    return count;
}

void Engine::run(const kvspn_step_params& params, int steps) {
    const cuda::OnDevice here(device_.index);
    check_step(params);
    if (!steps) return;
    const cuda::Control control{params.mask, params.k, params.eos, params.max_length};
    if (!controlled_ || control.mask != present_.mask || control.k != present_.k ||
        control.eos != present_.eos || control.max_length != present_.max_length) {
        present_ = control;
        cuda::check(
            cudaMemcpyAsync(control_.as<void>(), &present_, sizeof present_, cudaMemcpyHostToDevice, stream_),
            "decoder_step");
        controlled_ = true;
    }
    const int first = params.draft ? 0 : base_, last = int(stages_.size());
    const cuda::Pass pass{-1, 0, params.draft ? 2 : 1};
    switch (mode_) {
        case Mode::persistent:
            return cuda::launch_steps(device_, model_, plan_.as<Stage>() + first, last - first, pass, steps,
                                      stream_);
        case Mode::graph:
            while (steps-- > 0)  // one after the last row has finished does nothing
                graphs_[params.draft ? 1 : 0].launch(
                    [&](cudaStream_t stream) { launch_stages(first, last, pass, stream); }, stream_);
            return;
        case Mode::kernels:
            while (steps-- > 0) launch_stages(first, last, pass, stream_);
    }
}

int Engine::profile(const kvspn_step_params& params, kvspn_stage* stages, int capacity) {
    const cuda::OnDevice here(device_.index);
    check_step(params);
    require(mode_ == Mode::persistent,
            "KVSPN_CUDA_STEP must be persistent to have stages timed, got another");
    const int first = params.draft ? 0 : base_, count = int(stages_.size()) - first;
    // Positions of the two caches that the step attends to, before the step moves them.
    std::vector<int64_t> positions(2);
    std::vector<int32_t> lengths(size_t(model_.batch)), encoded(lengths.size());
    std::vector<uint8_t> finished(lengths.size());
    fetch(lengths.data(), model_.lengths, lengths.size() * sizeof(int32_t));
    fetch(encoded.data(), model_.cross_lengths, encoded.size() * sizeof(int32_t));
    fetch(finished.data(), model_.finished, finished.size());
    for (size_t row = 0; row < lengths.size(); ++row)
        if (!finished[row]) positions[0] += lengths[row], positions[1] += encoded[row];

    std::vector<cuda::Stamp> stamps(size_t(count) + 2);
    const Buffer there(stamps.size() * sizeof(cuda::Stamp), stream_);
    model_.stamps = there.as<cuda::Stamp>();
    try {
        run(params, 1);
        fetch(stamps.data(), model_.stamps, stamps.size() * sizeof(cuda::Stamp));
    } catch (...) {
        model_.stamps = nullptr;
        throw;
    }
    model_.stamps = nullptr;
    const cuda::Stamp &start = stamps.front(), &end = stamps.back();
    const double cycle =
        double(end.done - start.done) / double(std::max<int64_t>(end.passed - start.passed, 1));
    for (int i = 0; i < std::min(2 * count, capacity); ++i) {
        const Stage& stage = stages_[first + i / 2];
        const cuda::Stamp &before = stamps[i / 2], &stamp = stamps[i / 2 + 1];
        stages[i] = i % 2 ? kvspn_stage{"barrier", int64_t(cycle * double(stamp.passed - stamp.done)), 0}
                          : kvspn_stage{stage.name, int64_t(cycle * double(stamp.done - before.passed)),
                                        bytes_of(stage, positions)};
    }
    return 2 * count;
}

// Of weights, or of keys and values at the rows' positions, in the cache and of the encoder.
int64_t Engine::bytes_of(const Stage& stage, const std::vector<int64_t>& positions) const {
    if (stage.kind != Kind::attend) return stage.outputs * stage.pitch;
    const int stride = stage.cross && stage.draft ? weights_.encoder_stride : 1;
    const int64_t each = weights_.head_dim * int64_t(size_of(stage.dtype)) + (stage.kv_scale ? 4 : 0);
    return 2 * stage.layers * weights_.heads * each * ((positions[stage.cross] + stride - 1) / stride);
}

void Engine::launch_stages(int first, int last, const cuda::Pass& pass, cudaStream_t stream) {
    for (int i = first; i < last; ++i) cuda::launch_stage(device_, model_, stages_[i], pass, stream);
}

// Waits for it.
void Engine::fetch(void* to, const void* from, size_t bytes) const {
    cuda::check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_), "the batch");
    wait("the batch");
}

void Engine::wait(const char* what) const { cuda::check(cudaStreamSynchronize(stream_), what); }

void Engine::set(int32_t* at, int32_t value) {
    cuda::check(cudaMemcpyAsync(at, &value, sizeof value, cudaMemcpyHostToDevice, stream_), "lengths");
}

// Of one layer's keys and values.
int64_t Engine::layer_positions(bool cross) const {
    return 2 * int64_t(model_.batch) * weights_.heads * (cross ? batch_.cross_kv : batch_.kv).shape[4];
}

char* Engine::layer_kv(bool cross, int layer) const {
    const int64_t bytes = weights_.head_dim * int64_t(size_of(model_.kv_dtype));
    char* kv = static_cast<char*>((cross ? batch_.cross_kv : batch_.kv).data);
    return kv + layer * layer_positions(cross) * bytes;
}

float* Engine::layer_scale(bool cross, int layer) const {
    float* scale = static_cast<float*>((cross ? cross_kv_scale_ : kv_scale_).data);
    return scale ? scale + layer * layer_positions(cross) : nullptr;
}

}  // namespace kvspn
