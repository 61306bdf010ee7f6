// The speech encoder of a Whisper: its weights, and the order of its work, made once from them.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "common/memory.h"
#include "common/weights.h"
#include "kvspn.h"

namespace kvspn {

struct EncoderStage {
    // linear: to = from W^T + bias [-> GELU] [+ added]. norm: to = LayerNorm(from) [+ added].
    // attend: wide -> attended.
    enum class Kind { linear, attend, norm };
    // frames: the features, a row for each frame; convolved: what the first convolution makes of them. Both
    // with a row of zeros at either end, so that a convolution is linear on three rows that lie side by side.
    enum class Place { frames, convolved, residual, wide, attended, inner, states };

    const char* name;
    Kind kind = Kind::linear;
    Place from{}, to{};
    const Norm* norm = nullptr;  // in front of a matrix, or by itself
    const BlockMatrix* matrix = nullptr;
    int step = 1;  // rows of `from` for each row of `to`
    bool gelu = false, accumulate = false;
    const float* added = nullptr;  // [positions, width], row by row
    bool waits = false;            // reads rows of others: begins when all are done with the stage before
};

struct EncoderWeights {
    // Fills in weight, scale and offset from rows of floats [outputs, inputs].
    using Pack = std::function<void(const float* rows, BlockMatrix& matrix, Arena& memory)>;

    EncoderWeights(const kvspn_encoder_params& params, const kvspn_tensor* tensors, int count,
                   const Pack& pack);

    struct Layer {
        Norm self_norm, ffn_norm;
        BlockMatrix self_qkv, self_out, fc1, fc2;
    };

    int heads, width = 0, bands = 0, positions = 0;  // bands: of the mel spectrum; positions: at most
    bool output_positions;
    BlockMatrix conv1, conv2;
    std::vector<Layer> layers;
    Norm norm;
    const float* embed_positions = nullptr;

  private:
    const kvspn_tensor& get(const std::string& name, std::initializer_list<int64_t> shape) const;
    const float* vector(const std::string& name, int size);
    Norm read_norm(const std::string& name);
    BlockMatrix read_matrix(const std::string& name, Dtype format, int outputs, int inputs, int taps = 1);

    std::unordered_map<std::string, const kvspn_tensor*> tensors_;  // valid while constructing
    const Pack& pack_;                                              // too
    Arena memory_;
};

// The stages in their order; what lies between two that wait is one row's own.
std::vector<EncoderStage> plan_encoder(const EncoderWeights& weights);

class Encoder {
  public:
    virtual ~Encoder() = default;
    // samples FP32 [N] -> features FP32 [bands, (N + 159) / 160].
    virtual void log_mel(const kvspn_tensor& samples, const kvspn_tensor& features) = 0;
    // features FP32 [bands, T] -> states FP32 [(T + 1) / 2, width].
    virtual void encode(const kvspn_tensor& features, const kvspn_tensor& states) = 0;
    virtual const char* instruction_set() const = 0;
};

}  // namespace kvspn
