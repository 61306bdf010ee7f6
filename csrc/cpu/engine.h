// The decoder step on the CPU: one function that every thread of a team runs, phase after phase.
#pragma once

#include "common/memory.h"
#include "common/weights.h"
#include "cpu/kernels.h"
#include "cpu/profile.h"
#include "cpu/team.h"
#include "kvspn.h"

namespace kvspn {

constexpr int kPrefillChunk = 16;  // query tokens of one pass

const char* instruction_set();

class Engine {
  public:
    Engine(const kvspn_engine_params& params, const kvspn_tensor* weights, int count);

    void set_stream(void* stream);
    void bind(const kvspn_batch& batch);
    void encode(int row, const kvspn_tensor& states);
    void prefill(int row, int count);
    void step(const kvspn_step_params& params);
    int profile(const kvspn_step_params& params, kvspn_stage* stages, int capacity);
    void generate(const kvspn_generate_params& params);
    void rollback(int row, int length);
    void reset();
    void read_statistics(int row, kvspn_statistics& statistics) const;
    int progress(int row, int32_t* tokens, int capacity) const;

  private:
    // `queries` tokens of batch row `row` in one pass, the first at `position`; rows of x from `first`.
    // `cross`: the row's encoder positions.
    struct Slot {
        int row, position, queries, first, cross;
    };
    // [L, 2, B, H, capacity, D], and of int8 the scales [L, 2, B, H, capacity].
    struct Cache {
        char* values;
        float* scales;
        int32_t* lengths;
        int capacity;
    };
    struct Batch {
        Dtype dtype;  // of the caches
        Cache self, cross;
        int32_t *tokens, *stats;
        uint8_t* finished;
        int rows, token_capacity;
    };

    void check_bound() const;
    void check_row(int row) const;
    int cross_length(int row) const;  // checked
    void check_step(const kvspn_step_params& params) const;
    void base_pass(int thread);
    void propose(int thread);
    void verify(int thread, const char* name, const Norm& norm, const Matrix& head, const int32_t* ids);
    void accept();

    Rows input(int thread, const Norm* norm, const float* x, const Matrix& matrix);
    void linear(int thread, const char* name, const Norm* norm, const float* x, const Matrix& matrix,
                float* y, bool gelu, bool accumulate);
    void append(const Slot& slot, int layer, int head);
    void write(const Cache& cache, int layer, int part, int row, int head, int position, const float* x);
    void attend(int thread, const char* name, const Cache& cache, int layer, int layers, bool causal,
                int query_heads, int stride = 1);
    void stamp(int thread, const char* name, const Matrix* matrix = nullptr);
    void embed(const int32_t* ids);
    int64_t plane(int layer, int part, int row, int head) const;

    Weights weights_;
    Team team_;
    const Kernels& kernels_;
    Batch batch_{};
    const kvspn_step_params* params_ = nullptr;
    Stages* stages_ = nullptr;  // of the present profile()

    std::vector<int> prefilled_;  // tokens of each row
    std::vector<Slot> slots_;
    int slot_count_ = 0, rows_ = 0;  // of the present pass
    bool verify_drafts_ = false;
    int failed_ = -1;                                     // a slot whose row got no token in the present step
    int width_stride_, wide_stride_, scores_stride_ = 0;  // elements
    Memory x_, wide_, attended_, hidden_, normed_, quantised_, scales_, scores_, logits_, best_;
    Memory ids_, drafts_;  // int32, of every row of x and of every slot
};

}  // namespace kvspn
