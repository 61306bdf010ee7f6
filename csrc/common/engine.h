// An engine: the life of a batch's utterances, on any device.
#pragma once

#include <memory>
#include <vector>

#include "common/backend.h"
#include "kvspn.h"

namespace kvspn {

class Engine {
  public:
    Engine(const kvspn_engine_params& params, const kvspn_tensor* weights, int count);

    void set_stream(void* stream) { runner_->set_stream(stream); }
    void bind(const kvspn_batch& batch);
    void encode(int row, const kvspn_tensor& states);
    void prefill(int row, int first, int count, int position, const kvspn_tensor* logits);
    void set_rule(int row, const kvspn_rule& rule);
    void step(const kvspn_step_params& params);
    // How many stages there are; of them `capacity` are filled in at most.
    int plan(const kvspn_step_params& params, kvspn_stage* stages, int capacity);
    int profile(const kvspn_step_params& params, kvspn_stage* stages, int capacity);
    void generate(const kvspn_generate_params& params);
    void rollback(int row, int length);
    void reset();
    void read_statistics(int row, kvspn_statistics& statistics) const;
    int progress(int row, int32_t* tokens, int capacity) const;

  private:
    void check_bound() const;
    void check_row(int row) const;
    void check_step(const kvspn_step_params& params) const;
    void check_token(int row) const;
    void write_rule(int row);
    bool find_unfinished();
    void check_tokens() const;
    int length_limit() const;
    std::vector<int64_t> bytes_of_stages(const kvspn_step_params& params) const;

    const Backend& backend_;
    Weights weights_;
    Plan plan_;
    std::unique_ptr<Runner> runner_;
    Batch batch_{};
    std::vector<int> prefilled_;     // tokens of each row
    std::vector<RowRule> rules_;     // those that the runner has
    std::vector<uint8_t> finished_;  // each row's, before the present step
};

}  // namespace kvspn
