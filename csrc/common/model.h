// Sound to text: a model of one file, its encoder and its decoder, and Whisper's way through a recording.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/encoder.h"
#include "common/engine.h"
#include "common/memory.h"
#include "common/model_file.h"
#include "common/text.h"
#include "kvspn.h"

namespace kvspn {

// A segment in a window: seconds from the window's start, and the place of its tokens.
struct Piece {
    double start, end;
    size_t first, last;
};

// A window's tokens as segments, and the seconds of the window that they account for; see
// kvspn/speech/segments.py.
double split(const std::vector<int32_t>& tokens, int begin, double seconds, std::vector<Piece>& pieces);

class Model {
  public:
    Model(const char* path, const kvspn_model_params& params);

    // samples FP32 [N], mono at 16 kHz.
    void transcribe(const kvspn_tensor& samples, const kvspn_transcribe_params& params);

  private:
    // What a window's tokens are chosen under.
    struct Choice {
        std::vector<float> mask, first_mask;  // [vocabulary]; first_mask may be empty
        kvspn_rule rule{};
    };
    struct Heard {
        std::vector<int32_t> tokens;  // without the end
        bool whole = false;           // whether there was an end
        double avg_logprob = 0;
    };

    Model(const ModelFile& file, const kvspn_model_params& params);
    void bind(Dtype dtype);
    void listen(const float* features, int64_t frames, int64_t seek);
    const std::string& language(float& probability) const;
    double no_speech() const;
    std::vector<int32_t> prompt(const std::string& language, const char* target, bool timed) const;
    Choice choose(bool timed) const;
    Heard decode(const std::vector<int32_t>& prompt, const Choice& choice, kvspn_statistics& total);

    std::unique_ptr<Encoder> encoder_;
    std::unique_ptr<Engine> engine_;
    Vocabulary words_;
    std::map<std::string, int> languages_, targets_;  // tokens by code; both empty: English alone
    std::map<std::string, int> tasks_;
    int vocabulary_, end_, start_, begin_, no_speech_;  // tokens; begin_: of 0.00 s; no_speech_: or -1
    bool drafts_, target_follows_task_;
    std::vector<float> mask_, first_mask_;
    int bands_, positions_, width_, layers_, heads_, capacity_;

    std::vector<float> window_, states_;
    Memory kv_, cross_kv_;
    std::vector<int32_t> tokens_;
    std::vector<float> log_probs_, logits_;  // logits_: behind the start token
    int32_t length_ = 0, stats_[3] = {}, encoded_ = 0;
    uint8_t finished_ = 1;
};

}  // namespace kvspn
