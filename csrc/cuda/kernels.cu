#include "cuda/launch.h"
#include "cuda/stages.h"

namespace kvspn::cuda {
namespace {

constexpr int kAhead = 2;  // stages, of weights on their way: memory is busy through the barriers

constexpr int64_t kSharedPart = (sizeof(Shared) + 15) / 16 * 16;

// The block's memory: Shared, the plan if there is one, activations.
__device__ __forceinline__ Shared& shared_part() { return *reinterpret_cast<Shared*>(shared_memory()); }
__device__ __forceinline__ char* behind_shared() { return shared_memory() + kSharedPart; }

// Block 0 tops the count up to 2^31, so that its highest bit turns when all blocks have come: the barrier is
// ready for the next time, and for the next kernel, as it is. After a sync_block().
__device__ __forceinline__ uint32_t arrive(uint32_t* barrier) {
    if (thread_index()) return 0;
    return add_release(barrier, block_index() ? 1 : 0x80000000 - uint32_t(block_count() - 1));
}
__device__ __forceinline__ void wait(const uint32_t* barrier, uint32_t before) {
    if (thread_index() == 0)
        while (!((before ^ load_acquire(barrier)) & 0x80000000)) wait_a_moment();
    sync_block();
}

__device__ __forceinline__ void stamp(const Model& m, int at, int64_t first) {
    if (m.stamps && !block_index() && !thread_index()) m.stamps[at] = {first, cycles()};
}

template <Kind kind>
__global__ void __launch_bounds__(kThreads, 1)
    stage_kernel(const __grid_constant__ Model m, const __grid_constant__ Stage stage, const Pass pass) {
    let_next_kernel_start();
    prefetch_weights(stage);
    wait_for_previous_kernel();
    Shared& shared = shared_part();
    collect(m, pass, shared.slots);
    run_stage<kind>(m, stage, pass, shared, reinterpret_cast<float*>(behind_shared()));
}

__global__ void __launch_bounds__(kThreads, 1)
    step_kernel(const __grid_constant__ Model m, const Stage* plan, const int count, const Pass pass,
                const int steps) {
    Shared& shared = shared_part();
    Stage* stages = reinterpret_cast<Stage*>(behind_shared());
    float* x = reinterpret_cast<float*>(stages + count);
    for (int i = thread_index(); i < count * int(sizeof(Stage) / 4); i += thread_count())
        reinterpret_cast<uint32_t*>(stages)[i] = reinterpret_cast<const uint32_t*>(plan)[i];
    for (int step = 0; step < steps; ++step) {
        sync_block();
        collect(m, pass, shared.slots);
        if (!shared.slots.count) return;
        stamp(m, 0, nanoseconds());
        for (int i = 0; i < count; ++i) {
            const Stage& stage = stages[i];
            const Pass now = stage.draft ? Pass{} : pass;
            switch (stage.kind) {
                case Kind::embed:
                    run_stage<Kind::embed>(m, stage, now, shared, x);
                    break;
                case Kind::linear:
                    run_stage<Kind::linear>(m, stage, now, shared, x);
                    break;
                case Kind::attend:
                    run_stage<Kind::attend>(m, stage, now, shared, x);
                    break;
                case Kind::verify:
                    run_stage<Kind::verify>(m, stage, now, shared, x);
                    break;
                case Kind::accept:
                    run_stage<Kind::accept>(m, stage, now, shared, x);
            }
            sync_block();
            const int64_t done = cycles();
            if (i + 1 == count) stamp(m, count, done), stamp(m, count + 1, nanoseconds());
            if (i + 1 == count && step + 1 == steps) return;
            const uint32_t before = arrive(m.barrier);
            const Stage& soon = stages[(i + kAhead) % count];
            prefetch_weights(soon);
            prefetch_cross(m, soon, shared.slots);
            wait(m.barrier, before);
            if (i + 1 < count) stamp(m, 1 + i, done);
        }
    }
}

__global__ void to_float_kernel(const Table from, const int columns, const int64_t row_stride,
                                const int64_t column_stride, float* out, const int64_t out_stride) {
    wait_for_previous_kernel();
    for (int r = block_index(); r < from.count; r += block_count())
        for (int c = thread_index(); c < columns; c += thread_count())
            out[r * out_stride + c] = element(from, r * row_stride + c * column_stride);
}

}  // namespace

Device open_device() {
    const Device device = present_device();
    for (auto [name, kernel] :
         {std::pair<const char*, const void*>{"embed", pointer(&stage_kernel<Kind::embed>)},
          {"fused_linear", pointer(&stage_kernel<Kind::linear>)},
          {"flat_kv_attention", pointer(&stage_kernel<Kind::attend>)},
          {"lm_head_verify", pointer(&stage_kernel<Kind::verify>)},
          {"accept_and_rollback", pointer(&stage_kernel<Kind::accept>)},
          {"decoder_step", pointer(&step_kernel)}})
        allow_shared(name, kernel, device.shared_bytes);
    return device;
}

int shared_floats(const Device& device, int stages) {
    return int((device.shared_bytes - kSharedPart - stages * int64_t(sizeof(Stage))) / 4);
}

void launch_stage(const Device& device, Model m, const Stage& stage, const Pass& pass, cudaStream_t stream) {
    // No more of a multiprocessor's memory than the rows need, which leaves room for the next kernel's
    // blocks.
    const Pass now = stage.draft ? Pass{} : pass;
    const int rows = std::min((now.row < 0 ? m.batch : 1) * now.queries, kTile);
    const bool multiplies = stage.kind == Kind::linear || stage.kind == Kind::verify;
    if (multiplies) m.shared_floats = std::min(m.shared_floats, kMoments + rows * pad(stage.inputs, 1024));
    const int bytes = int(kSharedPart) + (multiplies ? 4 * m.shared_floats : 0);
    auto run = [&](const char* name, auto kernel, int blocks) {
        launch(name, device, kernel, {blocks, bytes}, stream, m, stage, now);
    };
    switch (stage.kind) {
        case Kind::embed:
            return run("embed", &stage_kernel<Kind::embed>, device.multiprocessors);
        case Kind::linear:
            return run("fused_linear", &stage_kernel<Kind::linear>, device.multiprocessors);
        case Kind::attend:
            return run("flat_kv_attention", &stage_kernel<Kind::attend>, device.multiprocessors);
        case Kind::verify:
            return run("lm_head_verify", &stage_kernel<Kind::verify>, device.multiprocessors);
        case Kind::accept:
            return run("accept_and_rollback", &stage_kernel<Kind::accept>, 1);
    }
}

void launch_steps(const Device& device, const Model& m, const Stage* stages, int count, const Pass& pass,
                  int steps, cudaStream_t stream) {
    launch("decoder_step", device, &step_kernel, {device.multiprocessors, device.shared_bytes, true}, stream,
           m, stages, count, pass, steps);
}

void launch_to_float(const Device& device, const Table& from, int columns, int64_t row_stride,
                     int64_t column_stride, float* out, int64_t out_stride, cudaStream_t stream) {
    launch("encoder states", device, &to_float_kernel, {device.multiprocessors}, stream, from, columns,
           row_stride, column_stride, out, out_stride);
}

}  // namespace kvspn::cuda
