#include "common/encoder.h"

#include <algorithm>
#include <cmath>

#include "common/error.h"

namespace kvspn {
namespace {

constexpr int kMostWidth = 1 << 16;  // so that 8-bit products of all columns fit into an int32

}  // namespace

EncoderWeights::EncoderWeights(const kvspn_encoder_params& params, const kvspn_tensor* tensors, int count,
                               const Pack& pack)
    : heads(params.heads), output_positions(params.output_positions), pack_(pack) {
    require(params.layers >= 0, "layers must be at least 0, got ", params.layers);
    require(heads >= 1, "heads must be at least 1, got ", heads);
    const Dtype format = Dtype(params.format);
    require(format == Dtype::fp32 || format == Dtype::bf16 || format == Dtype::int8,
            "format must be KVSPN_FP32, KVSPN_BF16 or KVSPN_INT8, got ", params.format);
    require(count >= 0 && (tensors || !count), "weights must be ", count, " tensors, got a null pointer");
    for (int i = 0; i < count; ++i) {
        require(tensors[i].name, "weights[", i, "] must have a name, got a null pointer");
        tensors_[tensors[i].name] = &tensors[i];
    }
    const kvspn_tensor& first = get("encoder.conv1.weight", {kAny, kAny, 3});
    const kvspn_tensor& embedded = get("encoder.embed_positions", {kAny, kAny});
    require(first.shape[0] >= 1 && first.shape[0] < kMostWidth / 3 && first.shape[1] >= 1 &&
                first.shape[1] < kMostWidth / 3,
            "encoder.conv1.weight must have 1 to ", kMostWidth / 3 - 1, " outputs and inputs, got ",
            first.shape[0], " x ", first.shape[1]);
    width = int(first.shape[0]), bands = int(first.shape[1]);
    require(width % heads == 0, "encoder.conv1.weight must have a multiple of ", heads,
            " heads outputs, got ", width);
    check_tensor("encoder.embed_positions", embedded, kFloats, {kAny, width});
    require(embedded.shape[0] >= 1 && embedded.shape[0] < (1 << 24),
            "encoder.embed_positions must have 1 to 2^24 - 1 rows, got ", embedded.shape[0]);
    positions = int(embedded.shape[0]);
    float* rows = memory_.take<float>(size_t(positions) * width);
    read_rows(embedded, positions, width, rows, width);
    embed_positions = rows;
    // In int8 only the feed-forward networks are, two thirds of the work: what a row loses in the
    // convolutions and in attention, in keys above all, costs the states twice as much as all the rest.
    const Dtype fine = format == Dtype::int8 ? Dtype::bf16 : format;
    conv1 = read_matrix("encoder.conv1", fine, width, bands, 3);
    conv2 = read_matrix("encoder.conv2", fine, width, width, 3);
    for (int i = 0; i < params.layers; ++i) {
        const std::string name = "encoder.layers." + std::to_string(i) + ".";
        Layer layer;
        layer.self_norm = read_norm(name + "self_norm");
        layer.self_qkv = read_matrix(name + "self_qkv", fine, 3 * width, width);
        layer.self_out = read_matrix(name + "self_out", fine, width, width);
        layer.ffn_norm = read_norm(name + "ffn_norm");
        const kvspn_tensor& up = get(name + "fc1.weight", {kAny, width});
        require(up.shape[0] >= 1 && up.shape[0] < kMostWidth, name, "fc1.weight must have 1 to ",
                kMostWidth - 1, " outputs, got ", up.shape[0]);
        layer.fc1 = read_matrix(name + "fc1", format, int(up.shape[0]), width);
        layer.fc2 = read_matrix(name + "fc2", format, width, int(up.shape[0]));
        layers.push_back(layer);
    }
    norm = read_norm("encoder.norm");
    tensors_.clear();
}

const kvspn_tensor& EncoderWeights::get(const std::string& name, std::initializer_list<int64_t> shape) const {
    const auto found = tensors_.find(name);
    require(found != tensors_.end(), name, " must be among the weights, got nothing");
    check_tensor(name, *found->second, kFloats, shape);
    return *found->second;
}

const float* EncoderWeights::vector(const std::string& name, int size) {
    float* own = memory_.take<float>(size_t(pad(size)));
    read_rows(get(name, {size}), 1, size, own, 0);
    return own;
}

Norm EncoderWeights::read_norm(const std::string& name) {
    return {vector(name + ".weight", width), vector(name + ".bias", width)};
}

// Of a convolution, whose weight is [outputs, inputs, taps], the inputs of a tap lie side by side.
BlockMatrix EncoderWeights::read_matrix(const std::string& name, Dtype format, int outputs, int inputs,
                                        int taps) {
    const kvspn_tensor& weight =
        taps == 1 ? get(name + ".weight", {outputs, inputs}) : get(name + ".weight", {outputs, inputs, taps});
    const int columns = inputs * taps;
    const auto rows = scratch<float>(size_t(outputs) * columns);
    const float* floats =  // without a call for each
        weight.dtype == int(Dtype::fp32) ? static_cast<const float*>(weight.data) : nullptr;
    for (int64_t output = 0; output < outputs; ++output) {
        float* row = rows.get() + output * columns;
        for (int64_t tap = 0; tap < taps; ++tap) {
            const int64_t first = output * weight.strides[0] + (taps == 1 ? 0 : tap * weight.strides[2]);
            for (int64_t input = 0; input < inputs; ++input) {
                const int64_t at = first + input * weight.strides[1];
                row[tap * inputs + input] = floats ? floats[at] : element(weight, at);
            }
        }
        const float* odd =
            std::find_if(row, row + columns, [](float value) { return !std::isfinite(value); });
        require(odd == row + columns, name, ".weight must be finite, got ", *odd, " in row ", output);
    }
    BlockMatrix matrix;
    matrix.format = format, matrix.outputs = outputs, matrix.inputs = columns;
    matrix.bias = vector(name + ".bias", outputs);
    pack_(rows.get(), matrix, memory_);
    return matrix;
}

std::vector<EncoderStage> plan_encoder(const EncoderWeights& w) {
    using Kind = EncoderStage::Kind;
    using Place = EncoderStage::Place;
    std::vector<EncoderStage> stages;
    const auto add = [&](const char* name, Kind kind, Place from, Place to) -> EncoderStage& {
        stages.push_back({name});
        EncoderStage& stage = stages.back();
        stage.kind = kind, stage.from = from, stage.to = to;
        return stage;
    };
    const auto linear = [&](const char* name, const Norm* norm, Place from, const BlockMatrix& matrix,
                            Place to) -> EncoderStage& {
        EncoderStage& stage = add(name, Kind::linear, from, to);
        stage.norm = norm, stage.matrix = &matrix;
        return stage;
    };
    EncoderStage& conv1 = linear("conv1", nullptr, Place::frames, w.conv1, Place::convolved);
    conv1.gelu = conv1.waits = true;
    EncoderStage& conv2 = linear("conv2", nullptr, Place::convolved, w.conv2, Place::residual);
    conv2.gelu = conv2.waits = true;
    conv2.step = 2, conv2.added = w.embed_positions;
    for (const EncoderWeights::Layer& layer : w.layers) {
        linear("self_qkv", &layer.self_norm, Place::residual, layer.self_qkv, Place::wide);
        add("self_attention", Kind::attend, Place::wide, Place::attended).waits = true;
        EncoderStage& out = linear("self_out", nullptr, Place::attended, layer.self_out, Place::residual);
        out.accumulate = out.waits = true;
        linear("fc1", &layer.ffn_norm, Place::residual, layer.fc1, Place::inner).gelu = true;
        linear("fc2", nullptr, Place::inner, layer.fc2, Place::residual).accumulate = true;
    }
    EncoderStage& last = add("norm", Kind::norm, Place::residual, Place::states);
    last.norm = &w.norm;
    if (w.output_positions) last.added = w.embed_positions;
    return stages;
}

}  // namespace kvspn
