#include "cpu/encoder.h"

#include <algorithm>
#include <cmath>

#include "common/cores.h"
#include "common/error.h"

namespace kvspn::cpu {
namespace {

constexpr float kEps = 1e-5f;  // of every LayerNorm

int threads_of(const kvspn_encoder_params& params) {
    require(params.threads >= 0 && params.threads <= 1024, "threads must be 0 to 1024, got ", params.threads);
    return params.threads ? params.threads : usable_cores();
}

// Matrices as a table of kernels has them.
EncoderWeights::Pack packing(const EncoderKernels& kernels) {
    return [&kernels](const float* rows, BlockMatrix& m, Arena& memory) {
        char* weight = memory.take<char>(size_t(kernels.weight_bytes(m.format, m.outputs, m.inputs)));
        const bool scaled = m.format == Dtype::int8;
        float* scale = scaled ? memory.take<float>(size_t(pad(m.outputs))) : nullptr;
        int32_t* offset = scaled ? memory.take<int32_t>(size_t(pad(m.outputs))) : nullptr;
        kernels.pack(m.format, rows, m.outputs, m.inputs, weight, scale, offset);
        m.weight = weight, m.scale = scale, m.offset = offset;
    };
}

}  // namespace

CpuEncoder::CpuEncoder(const kvspn_encoder_params& params, const kvspn_tensor* weights, int count)
    : kernels_(select_encoder_kernels(params.variant)),
      row_kernels_(select_kernels(params.variant)),
      format_(Dtype(params.format)),
      weights_(params, weights, count, packing(kernels_)),
      log_mel_(weights_.bands),
      stages_(plan_encoder(weights_)),
      team_(threads_of(params)),
      own_(size_t(team_.size())),
      inner_width_(3 * weights_.width),
      taken_(stages_.size()) {
    size_t operand = 0;
    for (const Stage& stage : stages_) {
        if (!stage.matrix) continue;
        const BlockMatrix& matrix = *stage.matrix;
        operand = std::max(operand, size_t(operand_stride(kernels_.words(matrix.format, matrix.inputs))));
        if (stage.to == Place::inner) inner_width_ = std::max(inner_width_, matrix.outputs);
    }
    const int head = pad(weights_.width / weights_.heads);
    for (Own& own : own_) {
        own.operand = Memory(kBlock * operand, false);
        own.normed = Memory(size_t(kBlock) * weights_.width * sizeof(float), false);
        own.inner = Memory(size_t(kBlock) * inner_width_ * sizeof(float), false);
        own.heads = Memory(size_t(kAttendScratch) + size_t(kBlock) * head * sizeof(float), false);
    }
}

void CpuEncoder::encode(const kvspn_tensor& features, const kvspn_tensor& states) {
    check_tensor("features", features, {Dtype::fp32}, {weights_.bands, kAny});
    const int64_t limit = 2 * int64_t(weights_.positions), frames = features.shape[1];
    require(frames >= 1 && frames <= limit, "features must have 1 to ", limit, " frames, got ", frames);
    check_tensor("states", states, {Dtype::fp32}, {(frames + 1) / 2, weights_.width});
    require(states.strides[1] == 1 || states.shape[1] == 1,
            "states must be contiguous in the last dimension, got stride ", states.strides[1]);
    reserve(int(frames));
    read_features(features);
    states_ = static_cast<char*>(states.data);
    states_stride_ = states.strides[0];
    for (std::atomic<int>& taken : taken_) taken.store(0, std::memory_order_relaxed);
    team_.run([this](int thread) { walk(thread); });
}

// Memory for so many frames; it grows alone.
void CpuEncoder::reserve(int frames) {
    const int positions = pad((frames + 1) / 2, kBlock);
    if (positions > reserved_) {
        reserved_ = 0;
        const size_t width = size_t(weights_.width), rows = size_t(positions);
        const HeadBytes head = kernels_.head_bytes(format_, weights_.width / weights_.heads, positions);
        spectrum_ = Memory((2 * rows + 2) * size_t(weights_.bands) * sizeof(float));
        convolved_ = Memory((2 * rows + 2) * width * sizeof(float));
        residual_ = Memory(rows * width * sizeof(float));
        attended_ = Memory(rows * width * sizeof(float));
        queries_ = Memory(size_t(weights_.heads) * size_t(head.queries));
        keys_ = Memory(size_t(weights_.heads) * size_t(head.keys));
        values_ = Memory(size_t(weights_.heads) * size_t(head.values));
        reserved_ = positions;
    }
    frames_ = frames, positions_ = (frames + 1) / 2;
}

// A row for each frame, and zeros behind the last; the first row is zeros, too.
void CpuEncoder::read_features(const kvspn_tensor& features) {
    const int bands = weights_.bands;
    float* rows = spectrum_.as<float>() + bands;
    for (int64_t band = 0; band < bands; ++band) {
        const float* from = static_cast<const float*>(features.data) + band * features.strides[0];
        for (int64_t frame = 0; frame < frames_; ++frame) {
            const float value = from[frame * features.strides[1]];
            require(std::isfinite(value), "features must be finite, got ", value, " in band ", band,
                    " of frame ", frame);
            rows[frame * bands + band] = value;
        }
    }
    std::fill_n(rows + int64_t(frames_) * bands, bands, 0.0f);
    std::fill_n(convolved_.as<float>() + (int64_t(frames_) + 1) * weights_.width, weights_.width, 0.0f);
}

int CpuEncoder::rows_of(const Stage& stage) const {
    return stage.to == Place::convolved ? frames_ : positions_;
}

int CpuEncoder::pieces_of(const Stage& stage) const {
    const int blocks = (rows_of(stage) + kBlock - 1) / kBlock;
    return stage.kind == Stage::Kind::attend ? blocks * weights_.heads : blocks;
}

// Stages up to the next that waits are one row's own: whoever takes a block of rows takes it through them
// all.
void CpuEncoder::walk(int thread) {
    for (size_t begin = 0, end; begin < stages_.size(); begin = end) {
        for (end = begin + 1; end < stages_.size() && !stages_[end].waits;) ++end;
        const int pieces = pieces_of(stages_[begin]);
        for (int piece; (piece = taken_[begin].fetch_add(1, std::memory_order_relaxed)) < pieces;) {
            for (size_t i = begin; i < end; ++i) {
                const Stage& stage = stages_[i];
                if (stage.kind == Stage::Kind::attend)
                    attend(thread, piece);
                else if (stage.kind == Stage::Kind::norm)
                    norm(stage, piece * kBlock);
                else
                    linear(thread, stage, piece * kBlock);
            }
        }
        team_.barrier();
    }
}

int64_t CpuEncoder::stride(Place place) const {
    if (place == Place::frames) return weights_.bands;
    if (place == Place::wide || place == Place::inner) return inner_width_;
    return place == Place::states ? states_stride_ : weights_.width;
}

// A row of what a stage reads or writes; of what a convolution reads, the row before it.
float* CpuEncoder::place(int thread, Place place, int row) const {
    const int64_t at = int64_t(row) * stride(place);
    switch (place) {
        case Place::frames:
            return spectrum_.as<float>() + at;
        case Place::convolved:
            return convolved_.as<float>() + at;
        case Place::residual:
            return residual_.as<float>() + at;
        case Place::attended:
            return attended_.as<float>() + at;
        case Place::states:
            return reinterpret_cast<float*>(states_) + at;
        case Place::wide:
        case Place::inner:
            break;
    }
    return own_[size_t(thread)].inner.as<float>() + row % kBlock * stride(place);
}

void CpuEncoder::linear(int thread, const Stage& stage, int first) {
    const Own& own = own_[size_t(thread)];
    LinearBlock block;
    block.matrix = stage.matrix;
    block.rows = std::min(kBlock, rows_of(stage) - first);
    block.x = place(thread, stage.from, stage.step * first);
    block.x_stride = stage.step * stride(stage.from);
    if (stage.norm) {
        float* normed = own.normed.as<float>();
        for (int r = 0; r < block.rows; ++r)
            row_kernels_.layer_norm(block.x + r * block.x_stride, stage.norm->weight, stage.norm->bias,
                                    weights_.width, kEps, normed + int64_t(r) * weights_.width);
        block.x = normed, block.x_stride = weights_.width;
    }
    block.y = place(thread, stage.to, first + (stage.to == Place::convolved));
    block.y_stride = stride(stage.to);
    block.gelu = stage.gelu;
    if (stage.accumulate)
        block.added = block.y, block.added_stride = block.y_stride;
    else if (stage.added)
        block.added = stage.added + int64_t(first) * weights_.width, block.added_stride = weights_.width;
    block.operand = own.operand.as<char>();
    kernels_.linear(block);
    if (stage.to == Place::wide) split(thread, first);
}

void CpuEncoder::norm(const Stage& stage, int first) {
    for (int row = first; row < std::min(first + kBlock, positions_); ++row) {
        float* to = place(0, stage.to, row);
        row_kernels_.layer_norm(place(0, stage.from, row), stage.norm->weight, stage.norm->bias,
                                weights_.width, kEps, to);
        if (!stage.added) continue;
        const float* added = stage.added + int64_t(row) * weights_.width;
        for (int c = 0; c < weights_.width; ++c) to[c] += added[c];
    }
}

HeadBlock CpuEncoder::head_block(int thread, int head, int first) const {
    HeadBlock block;
    block.format = format_;
    block.width = weights_.width / weights_.heads;
    block.positions = positions_;
    block.first = first;
    block.rows = std::min(kBlock, positions_ - first);
    const HeadBytes bytes = kernels_.head_bytes(format_, block.width, positions_);
    block.queries = queries_.as<char>() + head * bytes.queries;
    block.keys = keys_.as<char>() + head * bytes.keys;
    block.values = values_.as<char>() + head * bytes.values;
    block.scratch = own_[size_t(thread)].heads.as<char>();
    return block;
}

// A block's queries, keys and values -> those of each head.
void CpuEncoder::split(int thread, int first) {
    for (int head = 0; head < weights_.heads; ++head) {
        HeadBlock block = head_block(thread, head, first);
        block.q = place(thread, Place::wide, 0) + head * block.width;
        block.k = block.q + weights_.width;
        block.v = block.k + weights_.width;
        block.stride = stride(Place::wide);
        kernels_.split(block);
    }
}

// Of one head and one block of queries; a head's blocks follow one another, as they read the same keys.
void CpuEncoder::attend(int thread, int piece) {
    const int blocks = (positions_ + kBlock - 1) / kBlock, head = piece / blocks;
    HeadBlock block = head_block(thread, head, piece % blocks * kBlock);
    block.out = place(thread, Place::attended, block.first) + head * block.width;
    block.out_stride = stride(Place::attended);
    kernels_.attend(block);
}

}  // namespace kvspn::cpu
