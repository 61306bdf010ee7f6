#include "cuda/runner.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>

#include "common/error.h"
#include "common/ops.h"

namespace kvspn::cuda {

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

namespace {

constexpr const char* kModes[] = {"persistent", "graph", "kernels"};

// How steps run, by its name; the environment's KVSPN_CUDA_STEP overrides it.
int mode_of(const char* variant) {
    const char* overriding = std::getenv("KVSPN_CUDA_STEP");
    const char *given = overriding ? "KVSPN_CUDA_STEP" : "variant", *name = overriding ? overriding
                                                                            : variant  ? variant
                                                                                       : kModes[0];
    for (int mode = 0; mode < 3; ++mode)
        if (!std::strcmp(name, kModes[mode])) return mode;
    require(false, given, " must be persistent, graph or kernels, got ", name);
    return 0;
}

// Bytes of an output's weights, and their scales.
int64_t pitch_of(const Matrix& matrix) {
    return int64_t(matrix.columns) * int64_t(size_of(matrix.dtype)) / (matrix.dtype == Dtype::int4 ? 2 : 1);
}
int groups_of(const Matrix& matrix) { return matrix.dtype == Dtype::int4 ? matrix.inputs / matrix.span : 1; }

}  // namespace

CudaRunner::CudaRunner(const kvspn_engine_params& params, Weights& weights, const Plan& plan)
    : mode_(Mode(mode_of(params.variant))),
      device_(open_device()),
      process_(getpid()),
      weights_(weights),
      plan_(plan) {
    const Architecture& a = weights.architecture;
    require(a.key_heads == a.heads, "key_heads must be 0 on a CUDA device, got ", a.key_heads);
    require(!a.rms_norm, "rms_norm must be 0 on a CUDA device, got 1");
    require(a.norm_eps == 1e-5f, "norm_eps must be 0 on a CUDA device, got ", a.norm_eps);
    require(!a.gated, "gated must be 0 on a CUDA device, got 1");
    require(!a.rotary_base, "rotary_base must be 0 on a CUDA device, got ", a.rotary_base);
    require(a.cross, "no_cross must be 0 on a CUDA device, got 1");
    const Stream stream;  // beside what others do on the default stream
    stream_ = stream;
    upload_weights();
    stream_ = nullptr;
}

CudaRunner::~CudaRunner() {
    if (getpid() != process_) return;  // The device's memory is the parent's.
    // Kernels that still run use what goes now, and whose stream it was may be gone.
    const OnDevice device(device_.index);
    cudaDeviceSynchronize();
}

// To be held through a call that is for the device.
OnDevice CudaRunner::here() const {
    if (getpid() != process_)
        throw std::runtime_error("the engine must be used in the process that made it, got a fork's child");
    return OnDevice(device_.index);
}

Buffer& CudaRunner::keep(Buffer buffer) {
    weight_memory_.push_back(std::move(buffer));
    return weight_memory_.back();
}

const float* CudaRunner::upload(const float* values, int count) {
    return values ? keep(Buffer(values, size_t(count) * sizeof(float), stream_)).as<float>() : nullptr;
}

Matrix CudaRunner::upload(const Matrix& matrix) {
    Matrix copy = matrix;
    if (!matrix.weight) return copy;
    copy.weight = keep(Buffer(matrix.weight, size_t(matrix.outputs * pitch_of(matrix)), stream_)).as<void>();
    copy.scale = upload(matrix.scale, matrix.outputs * groups_of(matrix));
    copy.bias = upload(matrix.bias, matrix.outputs);
    return copy;
}

Norm CudaRunner::upload(const Norm& norm) {
    return {upload(norm.weight, weights_.width), upload(norm.bias, weights_.width)};
}

Table CudaRunner::upload(const kvspn::Table& table) {
    const size_t bytes = size_t(table.count) * table.width * size_of(table.dtype);
    return {table.dtype, keep(Buffer(table.rows, bytes, stream_)).as<void>(), table.count};
}

// All weights to the device; the host's copies go.
void CudaRunner::upload_weights() {
    Weights& w = weights_;
    int64_t inner = w.width, wide = 3 * w.width;
    model_.tokens = upload(w.tokens), model_.positions = upload(w.positions);
    w.norm = upload(w.norm);
    const bool own_head = w.draft_head.weight && w.draft_head.weight != w.head.weight;
    w.head = upload(w.head);
    w.draft_head = own_head ? upload(w.draft_head) : w.head;
    for (Layer& layer : w.layers) {
        for (Norm* norm : {&layer.self_norm, &layer.cross_norm, &layer.ffn_norm}) *norm = upload(*norm);
        for (Matrix* matrix : {&layer.self_qkv, &layer.self_out, &layer.cross_q, &layer.cross_kv,
                               &layer.cross_out, &layer.fc1, &layer.fc2})
            *matrix = upload(*matrix);
    }
    for (Block& block : w.blocks) {
        for (Norm* norm : {&block.kv_norm, &block.cross_norm, &block.ffn_norm}) *norm = upload(*norm);
        for (Matrix* matrix :
             {&block.kv_q, &block.kv_out, &block.cross_q, &block.cross_out, &block.fc1, &block.fc2})
            *matrix = upload(*matrix);
    }
    if (!w.blocks.empty()) w.draft_norm = upload(w.draft_norm);
    if (w.draft_ids)
        model_.draft_ids =
            keep(Buffer(w.draft_ids, size_t(w.draft_head.outputs) * sizeof(int32_t), stream_)).as<int32_t>();
    for (const kvspn::Stage& stage : plan_.stages) {
        if (stage.to == Place::wide) wide = std::max<int64_t>(wide, stage.matrix->outputs);
        if (stage.to == Place::inner) inner = std::max<int64_t>(inner, stage.matrix->outputs);
    }
    inner_stride_ = pad(int(inner)), wide_stride_ = pad(int(wide));
    model_.x_stride = pad(w.width);
    model_.width = w.width, model_.heads = w.architecture.heads, model_.head_dim = w.head_dim;
    model_.encoder_stride = w.architecture.encoder_stride;
    wait();
    w.release();
}

void CudaRunner::bind(const Batch& b) {
    const OnDevice held = here();
    require(b.rows <= kMaxBatch, "kv must have at most ", kMaxBatch, " rows, got ", b.rows);
    const int64_t head_bytes = b.head_dim * int64_t(size_of(b.dtype));
    require(head_bytes % 16 == 0 && head_bytes <= kMaxHeadBytes, "kv must have heads of 16 to ",
            kMaxHeadBytes, " bytes, a multiple of 16, got ", head_bytes);
    for (auto& [name, data] : {std::pair<const char*, const void*>{"kv", b.self.values},
                               {"cross_kv", b.cross.values},
                               {"kv_scale", b.self.scales},
                               {"cross_kv_scale", b.cross.scales}})
        require(reinterpret_cast<uintptr_t>(data) % 16 == 0, name,
                " must start at a multiple of 16 bytes, got another address");

    // Kernels that still run use what is replaced now, the pinned memory too.
    check(cudaDeviceSynchronize(), "bind");
    batch_ = b;
    model_.kv_dtype = b.dtype;
    model_.lengths = b.self.lengths, model_.ids = b.tokens, model_.stats = b.stats;
    model_.cross_lengths = b.cross.lengths;
    model_.finished = reinterpret_cast<bool*>(b.finished);
    model_.batch = b.rows, model_.capacity = b.self.capacity, model_.id_capacity = b.token_capacity;

    const size_t rows = size_t(b.rows), states = size_t(b.cross.capacity);
    const auto zeros = [&](size_t bytes) { return Buffer(bytes, stream_); };
    drafts_ = zeros(rows * (kMostQueries - 1) * sizeof(int32_t));
    model_.drafts = drafts_.as<int32_t>();
    rules_ = zeros(rows * sizeof(RowRule));
    model_.rules = rules_.as<RowRule>();
    draft_best_ = zeros(rows * sizeof(uint64_t)), arrived_ = zeros(rows * b.heads * sizeof(int32_t));
    barrier_ = zeros(sizeof(uint32_t)), control_ = zeros(sizeof(Control));
    states_ = zeros(states * model_.x_stride * sizeof(float));
    projected_ = zeros(b.cross.scales ? states * 2 * weights_.width * sizeof(float) : 0);
    model_.draft_best = draft_best_.as<uint64_t>(), model_.arrived = arrived_.as<int32_t>();
    model_.barrier = barrier_.as<uint32_t>(), model_.control = control_.as<Control>();
    progress_ = Pinned(rows * (1 + size_t(b.token_capacity)) * sizeof(int32_t));
    model_.progress = progress_.as<int32_t>();
    controlled_ = cut_ = false;
    reserve(2);
}

// Memory for passes of so many queries a row, and the stages in it.
void CudaRunner::reserve(int queries_of_row) {
    check(cudaStreamSynchronize(stream_), "the stream");  // What runs uses what is replaced now.
    queries_ = queries_of_row;
    const size_t queries = most_queries();
    const auto zeros = [&](size_t bytes) { return Buffer(bytes, stream_); };
    x_ = zeros(queries * model_.x_stride * sizeof(float));
    wide_ = zeros(queries * wide_stride_ * sizeof(float));
    attended_ = zeros(queries * wide_stride_ * sizeof(float));
    inner_ = zeros(queries * inner_stride_ * sizeof(float));
    best_ = zeros(queries * sizeof(uint64_t)), above_ = zeros(queries * sizeof(int32_t));
    parts_ = zeros(queries * size_t(device_.multiprocessors) * kKinds * sizeof(Part));
    scores_ = zeros(queries * 2 * sizeof(float));
    draft_logits_ = zeros(queries * sizeof(float));
    model_.draft_outputs = weights_.draft_head.outputs;
    model_.kept_stride = pad(std::max(weights_.head.outputs, weights_.draft_head.outputs));
    kept_ = zeros(cut_ ? queries * size_t(model_.kept_stride) * sizeof(float) : 0);
    model_.kept = kept_.as<float>();
    model_.scores = scores_.as<float>();
    model_.parts = parts_.as<Part>(), model_.draft_logits = draft_logits_.as<float>();
    model_.parts_stride = int64_t(queries), model_.blocks = device_.multiprocessors;
    model_.x = x_.as<float>();
    model_.best = best_.as<uint64_t>(), model_.above = above_.as<int32_t>();
    for (Graph& graph : graphs_) graph.reset();
    place_stages();
}

// The plan's stages on the present batch, and the memory that they need.
void CudaRunner::place_stages() {
    stages_.clear();
    for (const kvspn::Stage& stage : plan_.stages) stages_.push_back(placed(stage));
    model_.partial_pitch = pitch_of_partial(batch_.head_dim);
    size_t partials = 0;
    int longest = 0;  // row of activations, in a block's memory
    for (const Stage& stage : stages_) {
        if (stage.kind == Kind::attend) {
            const size_t split = size_t(32 / stage.lanes * loads_of(stage.dtype));
            const size_t splits = stage.layers * ((stage.capacity + split - 1) / split);
            partials = std::max(partials, splits * most_queries() * stage.query_heads * model_.partial_pitch);
        } else {
            longest = std::max(longest, pad(stage.inputs, 1024));
        }
    }
    partials_ = Buffer(partials * sizeof(float), stream_);
    model_.partials = partials_.as<float>();
    model_.shared_floats = shared_floats(device_, int(stages_.size()));
    const int room = model_.shared_floats - kMoments;
    require(longest <= room, "weights must be at most ", room / 1024 * 1024,
            " columns wide on this device, got ", longest);
    placed_ = Buffer(stages_.data(), stages_.size() * sizeof(Stage), stream_);
}

// Rows of activations, and floats from one to the next.
std::pair<float*, int64_t> CudaRunner::place(Place place) const {
    switch (place) {
        case Place::states:
            return {states_.as<float>(), model_.x_stride};
        case Place::residual:
            return {x_.as<float>(), model_.x_stride};
        case Place::wide:
            return {wide_.as<float>(), wide_stride_};
        case Place::attended:
            return {attended_.as<float>(), wide_stride_};
        case Place::inner:
            return {inner_.as<float>(), inner_stride_};
        case Place::cross:
            return {projected_.as<float>(), 2 * weights_.width};
        case Place::none:
            break;
    }
    return {nullptr, 0};
}

// A stage as the device reads it.
Stage CudaRunner::placed(const kvspn::Stage& stage) const {
    Stage s;
    s.kind = stage.kind, s.draft = stage.draft;
    std::tie(s.x, s.x_stride) = place(stage.from);
    std::tie(s.y, s.y_stride) = place(stage.to);
    if (stage.norm) s.norm_weight = stage.norm->weight, s.norm_bias = stage.norm->bias;
    if (const Matrix* matrix = stage.matrix) {
        s.dtype = matrix->dtype;
        s.weight = static_cast<const char*>(matrix->weight), s.scale = matrix->scale, s.bias = matrix->bias;
        s.pitch = pitch_of(*matrix), s.groups = groups_of(*matrix);
        while (1 << s.group_shift < matrix->span) ++s.group_shift;
        s.inputs = matrix->inputs, s.outputs = matrix->outputs;
        s.gelu = stage.activation == Activation::gelu, s.accumulate = stage.accumulate;
    }
    if (stage.queries && batch_.queries) {
        s.queries = true, s.kv = reinterpret_cast<char*>(batch_.queries_of(stage.layer, 0, 0));
        s.kept = s.outputs, s.capacity = batch_.query_capacity;
        return s;
    }
    const bool cross = stage.cross || stage.to == Place::cross;
    const Cache& cache = cross ? batch_.cross : batch_.self;
    if (stage.kind == Kind::attend) {
        s.dtype = batch_.dtype, s.kv_scale = batch_.scales_of(cache, stage.layer), s.layers = stage.layers;
        s.query_heads = stage.query_heads, s.causal = stage.causal, s.cross = stage.cross;
        s.lanes = lanes_of(batch_.head_dim * int64_t(size_of(batch_.dtype)));
    } else if (!stage.keys || cache.scales) {  // A cache of int8 gets its keys from attention.
        return s;
    }
    s.kv = batch_.values_of(cache, stage.layer), s.capacity = cache.capacity;
    s.kept = stage.to == Place::wide ? weights_.width : 0;
    return s;
}

void CudaRunner::encode(int row, const kvspn_tensor& states) {
    const OnDevice held = here();
    const int64_t count = states.shape[0];
    check(cudaMemsetAsync(batch_.cross.lengths + row, 0, sizeof(int32_t), stream_), "encode");
    int64_t at = 0;  // The draft network's positions come first.
    for (int first = 0, stride = weights_.architecture.encoder_stride;
         first < std::min<int64_t>(stride, count); ++first) {
        const kvspn_tensor rows = every(stride, first, states);
        launch_to_float(device_, {Dtype(rows.dtype), rows.data, int32_t(rows.shape[0])}, weights_.width,
                        rows.strides[0], rows.strides[1], states_.as<float>() + at * model_.x_stride,
                        model_.x_stride, stream_);
        at += rows.shape[0];
    }
    for (const kvspn::Stage& stage : plan_.encode) {
        launch_stage(device_, model_, placed(stage), {row, 0, int32_t(count)}, stream_);
        if (batch_.cross.scales) append_cross(stage.layer, row, count);
    }
}

// Keys and values [E, 2, H, D] of one layer, the first of a row, to a cache of int8.
void CudaRunner::append_cross(int layer, int row, int64_t count) {
    const Cache& cache = batch_.cross;
    const int64_t heads = batch_.heads, head_dim = batch_.head_dim, width = heads * head_dim,
                  head = cache.capacity, one = heads * head, part = batch_.rows * one;
    const kvspn_stream stream{stream_, nullptr, nullptr, nullptr, 0};
    float* keys = projected_.as<float>();
    kvspn_append_params p{};
    p.kv = {"kv",
            batch_.values_of(cache, layer) + row * one * head_dim,
            KVSPN_INT8,
            6,
            {1, 2, 1, heads, cache.capacity, head_dim},
            {2 * part * head_dim, part * head_dim, one * head_dim, head * head_dim, head_dim, 1}};
    p.kv_scale = {"kv_scale", batch_.scales_of(cache, layer) + row * one, KVSPN_FP32,
                  5,          {1, 2, 1, heads, cache.capacity},           {2 * part, part, one, head, 1}};
    p.k = {"k", keys, KVSPN_FP32, 4, {1, heads, count, head_dim}, {0, head_dim, 2 * width, 1}};
    p.v = p.k, p.v.name = "v", p.v.data = keys + width;
    p.lengths = {"lengths", cache.lengths + row, KVSPN_INT32, 1, {1}, {1}};
    p.stream = &stream;
    append_kv(p);
}

void CudaRunner::prefill(int row, int first, int count, int position, float* logits) {
    const OnDevice held = here();
    for (; first < count; first += kPrefillChunk) {
        const int queries = std::min(kPrefillChunk, count - first);
        launch_stages(plan_.base, plan_.judge, {row, first, queries}, stream_);
        if (!logits || position < first || position >= first + queries) continue;
        Stage head = stages_[size_t(plan_.judge)];
        head.kind = Kind::linear;
        head.x += (position - first) * head.x_stride, head.y = logits, head.y_stride = head.outputs;
        launch_stage(device_, model_, head, {row, position, 1}, stream_);
    }
}

void CudaRunner::run(const kvspn_step_params& params, int steps) {
    const OnDevice held = here();
    if (!steps) return;
    const kvspn_tensor* given = params.draft_tokens;
    const Pass pass{-1, 0, 1 + drafts_of(params)};
    if (pass.queries > queries_) reserve(pass.queries);
    const Control control{params.mask,
                          {params.k, params.eos, params.max_length},
                          given ? static_cast<const int32_t*>(given->data) : nullptr,
                          given ? given->strides[0] : 0,
                          params.first_mask,
                          params.log_probs ? static_cast<float*>(params.log_probs->data) : nullptr};
    const auto fields = [](const Control& c) {
        return std::tie(c.mask, c.rule.k, c.rule.eos, c.rule.max_length, c.drafts, c.drafts_b, c.first_mask,
                        c.log_probs);
    };
    if (!controlled_ || fields(control) != fields(present_)) {
        present_ = control;
        write(control_.as<void>(), &present_, sizeof present_);
        controlled_ = true;
    }
    const int first = params.draft ? 0 : plan_.base, last = int(stages_.size());
    switch (mode_) {
        case Mode::persistent:
            return launch_steps(device_, model_, placed_.as<Stage>() + first, last - first, pass, steps,
                                stream_);
        case Mode::graph:
            while (steps-- > 0)  // One after the last row has finished does nothing.
                graphs_[params.draft ? 0 : pass.queries].launch(
                    [&](cudaStream_t stream) { launch_stages(first, last, pass, stream); }, stream_);
            return;
        case Mode::kernels:
            while (steps-- > 0) launch_stages(first, last, pass, stream_);
    }
}

std::vector<Timing> CudaRunner::profile(const kvspn_step_params& params) {
    const OnDevice held = here();
    require(mode_ == Mode::persistent,
            "the engine's variant must be persistent to have stages timed, got another");
    const size_t count = stages_.size() - size_t(params.draft ? 0 : plan_.base);
    std::vector<Stamp> stamps(count + 2);
    const Buffer there(stamps.size() * sizeof(Stamp), stream_);
    model_.stamps = there.as<Stamp>();
    try {
        run(params, 1);
        read(stamps.data(), model_.stamps, stamps.size() * sizeof(Stamp));
    } catch (...) {
        model_.stamps = nullptr;
        throw;
    }
    model_.stamps = nullptr;
    const Stamp &start = stamps.front(), &end = stamps.back();
    const double cycle =
        double(end.done - start.done) / double(std::max<int64_t>(end.passed - start.passed, 1));
    std::vector<Timing> timings(count);
    for (size_t i = 0; i < count; ++i) {
        const Stamp &before = stamps[i], &stamp = stamps[i + 1];
        timings[i] = {int64_t(cycle * double(stamp.done - before.passed)),
                      int64_t(cycle * double(stamp.passed - stamp.done))};
    }
    return timings;
}

void CudaRunner::launch_stages(int first, int last, const Pass& pass, cudaStream_t stream) {
    for (int i = first; i < last; ++i) launch_stage(device_, model_, stages_[size_t(i)], pass, stream);
}

void CudaRunner::set_rule(int row, const RowRule& rule) {
    const OnDevice held = here();
    if (is_cut(rule) && !cut_) cut_ = true, reserve(queries_);
    write(rules_.as<RowRule>() + row, &rule, sizeof rule);
}

Shown CudaRunner::shown(int row) const {
    const volatile int32_t* from = model_.progress + int64_t(row) * (1 + model_.id_capacity);
    const int count = *from;
    std::atomic_thread_fence(std::memory_order_acquire);
    return {count, from + 1};
}

void CudaRunner::forget(int row, int count) {
    int32_t& shown = model_.progress[int64_t(row) * (1 + model_.id_capacity)];
    shown = std::min(shown, count);
}

void CudaRunner::write(void* to, const void* from, size_t bytes) {
    const OnDevice held = here();
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_), "the batch");
}

void CudaRunner::read(void* to, const void* from, size_t bytes) const {
    const OnDevice held = here();
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_), "the batch");
    wait();
}

void CudaRunner::wait() const {
    const OnDevice held = here();
    check(cudaStreamSynchronize(stream_), "the stream");
}

}  // namespace kvspn::cuda
