// Plans on the CPU: one function that every thread of a team runs, stage after stage.
#pragma once

#include <chrono>

#include "common/memory.h"
#include "common/runner.h"
#include "cpu/judge.h"
#include "cpu/team.h"
#include "kvspn.h"

namespace kvspn::cpu {

class CpuRunner : public Runner {
  public:
    CpuRunner(const kvspn_engine_params& params, const Weights& weights, const Plan& plan);

    bool asynchronous() const override { return false; }
    void set_stream(void* stream) override;
    void bind(const Batch& batch) override;
    void encode(int row, const kvspn_tensor& states) override;
    void prefill(int row, int first, int count, int position, float* logits) override;
    void run(const kvspn_step_params& params, int steps) override;
    std::vector<Timing> profile(const kvspn_step_params& params) override;
    Shown shown(int row) const override;
    void forget(int, int) override {}
    void set_rule(int row, const RowRule& rule) override { rules_[size_t(row)] = rule; }
    void write(void* to, const void* from, size_t bytes) override;
    void read(void* to, const void* from, size_t bytes) const override;
    void wait() const override {}

  private:
    // `queries` tokens of batch row `row` in one pass, the first at `position`; rows of x from `first`.
    // `cross`: the row's encoder positions. drafts: those that a step is given, of which the cache may have
    // no place for all.
    struct Slot {
        int row, position, queries, first, cross, drafts;
    };
    struct SlotRow;

    int cross_length(int row) const;  // checked
    void reserve(int64_t rows);
    void reserve_draws();
    bool find_slots();
    void tell(int r, float* logits);
    void walk(int thread, int first, int last);
    void take_drafts();
    Judge judge(const Stage& stage, const Slot& slot, int query) const;
    void open_windows();
    void embed();
    Rows input(int thread, const Norm* norm, const float* x, const Matrix& matrix);
    void linear(int thread, const Stage& stage);
    void keep_queries(int layer, int first, int last);
    void attend(int thread, const Stage& stage);
    void rotate(const Slot& slot, int first_head, int heads) const;
    void append(const Slot& slot, int layer, int head);
    void write_position(const Cache& cache, int layer, int part, int row, int head, int position,
                        const float* x);
    void verify(int thread, const Stage& stage);
    void accept();
    float* place(Place place) const;
    int64_t stride(Place place) const;

    const Weights& weights_;
    const Plan& plan_;
    Team team_;
    const Kernels& kernels_;
    Batch batch_{};
    const kvspn_step_params* params_ = nullptr;

    std::vector<RowRule> rules_;  // of the batch's rows
    std::vector<Slot> slots_;
    int slot_count_ = 0, rows_ = 0;                       // of the present pass
    int reserved_ = 0;                                    // rows of a pass that there is memory for
    int width_stride_, wide_stride_, scores_stride_ = 0;  // elements
    Memory x_, wide_, attended_, hidden_, normed_, quantised_, scales_, scores_, logits_, best_, parts_,
        windows_;
    Memory rotary_;         // [capacity, D / 2]: cosines and sines of each position's angles
    Memory kept_, ranked_;  // logits of rows that are cut, and of each thread their best
    int kept_stride_, ranked_stride_ = 0;
    Memory ids_;  // int32, the tokens of the rows of x: of a slot the newest, then its drafts

    std::vector<Timing>* timings_ = nullptr;  // of the present profile()
    std::chrono::steady_clock::time_point last_;
};

}  // namespace kvspn::cpu
