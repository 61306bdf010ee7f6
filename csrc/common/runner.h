// What a device does for an engine: it runs the passes of a plan, and reads and writes the batch.
#pragma once

#include <vector>

#include "common/batch.h"
#include "common/plan.h"
#include "common/rule.h"

namespace kvspn {

// The tokens of a row as the host sees them now: the prompt, and what steps have added.
struct Shown {
    int count;
    const volatile int32_t* tokens;
};

// Nanoseconds of a stage, and of the barrier behind it where that is told apart: else -1.
struct Timing {
    int64_t stage, barrier;
};

// Drafts of a row in a step, at most.
inline int drafts_of(const kvspn_step_params& params) {
    return params.draft_tokens ? int(params.draft_tokens->shape[1]) : params.draft ? 1 : 0;
}

// The engine has checked what it is given, but for what is in the batch's memory.
class Runner {
  public:
    virtual ~Runner() = default;

    // Whether a step may still run when run() returns.
    virtual bool asynchronous() const = 0;
    virtual void set_stream(void* stream) = 0;
    // The batch that the calls below work on; where it throws, that is still the last one.
    virtual void bind(const Batch& batch) = 0;
    // Encoder states [E, d] of a row through the plan's encode stages.
    virtual void encode(int row, const kvspn_tensor& states) = 0;
    // The tokens of a row from `first` to before `count` through the base model; `logits`, or null: where
    // those behind the one at `position` go.
    virtual void prefill(int row, int first, int count, int position, float* logits) = 0;
    // `steps` steps of every unfinished row, fewer where all have finished.
    virtual void run(const kvspn_step_params& params, int steps) = 0;
    // One step; the timings of its stages, in the plan's order.
    virtual std::vector<Timing> profile(const kvspn_step_params& params) = 0;

    virtual Shown shown(int row) const = 0;
    // Of a row's tokens at most `count` are shown from now on.
    virtual void forget(int row, int count) = 0;
    // How a row of the batch chooses its tokens, by zeros after bind().
    virtual void set_rule(int row, const RowRule& rule) = 0;
    // Bytes of the batch, from the host's memory and to it; reading waits for what runs.
    virtual void write(void* to, const void* from, size_t bytes) = 0;
    virtual void read(void* to, const void* from, size_t bytes) const = 0;
    virtual void wait() const = 0;
};

}  // namespace kvspn
