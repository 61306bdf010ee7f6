// The speech encoder on the CPU: its plan, run by a team of threads that take the work block by block.
#pragma once

#include <atomic>

#include "common/encoder.h"
#include "cpu/encoder_kernels.h"
#include "cpu/kernels.h"
#include "cpu/log_mel.h"
#include "cpu/team.h"

namespace kvspn::cpu {

class CpuEncoder : public Encoder {
  public:
    CpuEncoder(const kvspn_encoder_params& params, const kvspn_tensor* weights, int count);

    void log_mel(const kvspn_tensor& samples, const kvspn_tensor& features) override {
        log_mel_.run(team_, samples, features);
    }
    void encode(const kvspn_tensor& features, const kvspn_tensor& states) override;
    const char* instruction_set() const override { return kernels_.name; }

  private:
    using Stage = EncoderStage;
    using Place = EncoderStage::Place;

    void reserve(int frames);
    void read_features(const kvspn_tensor& features);
    int rows_of(const Stage& stage) const;
    int pieces_of(const Stage& stage) const;
    void walk(int thread);
    void linear(int thread, const Stage& stage, int first);
    void norm(const Stage& stage, int first);
    void attend(int thread, int piece);
    void split(int thread, int first);
    float* place(int thread, Place place, int row) const;
    int64_t stride(Place place) const;
    HeadBlock head_block(int thread, int head, int first) const;

    const EncoderKernels& kernels_;
    const Kernels& row_kernels_;
    const Dtype format_;
    const EncoderWeights weights_;
    const LogMel log_mel_;
    const std::vector<EncoderStage> stages_;
    Team team_;

    // What a piece needs for itself, a thread each.
    struct Own {
        Memory operand, normed, inner, heads;
    };
    std::vector<Own> own_;
    int inner_width_ = 0;

    int frames_ = 0, positions_ = 0;  // of the present call
    int reserved_ = 0;                // positions, a multiple of kBlock
    Memory spectrum_, convolved_, residual_, attended_, queries_, keys_, values_;
    char* states_ = nullptr;
    int64_t states_stride_ = 0;
    std::vector<std::atomic<int>> taken_;  // pieces of each stage
};

}  // namespace kvspn::cpu
