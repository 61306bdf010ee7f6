#include "cuda/emulation.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <random>
#include <set>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the emulation of CUDA switches fibers on x86-64 alone"
#endif

// Saves what a call preserves on the present stack, whose top goes to *from, and goes on on the other stack.
extern "C" void kvspn_switch_stack(void** from, void* to);
asm(R"(
.text
.globl kvspn_switch_stack
.hidden kvspn_switch_stack
.type kvspn_switch_stack, @function
kvspn_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size kvspn_switch_stack, .-kvspn_switch_stack
)");

// What the tests set: the order of threads, the device's size, the launch that fails (-1: none), the present
// device. What they read: that of the last launch.
extern "C" {
__attribute__((visibility("default"))) uint32_t kvspn_emulation_seed = 0;
__attribute__((visibility("default"))) int32_t kvspn_emulation_multiprocessors = 3;
__attribute__((visibility("default"))) int32_t kvspn_emulation_shared_bytes = 48 << 10;
__attribute__((visibility("default"))) int32_t kvspn_emulation_failing_launch = -1;
__attribute__((visibility("default"))) int32_t kvspn_emulation_device = 0;
__attribute__((visibility("default"))) int32_t kvspn_emulation_launched_on = -1;
}

struct EmulatedStream {
    EmulatedGraph* captured = nullptr;
};
struct EmulatedGraph {
    std::vector<std::function<void()>> calls;
};

namespace {

std::set<cudaStream_t> used;  // given work, or waited for
bool busy = false;            // kernels may still run, as far as the host knows

void use(cudaStream_t stream) { used.insert(stream); }

}  // namespace

// For the tests: a new stream; and the streams used since this was last asked, whose number it returns.
extern "C" {
__attribute__((visibility("default"))) void* kvspn_emulation_stream() { return new EmulatedStream; }
__attribute__((visibility("default"))) int32_t kvspn_emulation_used(void** streams, int32_t capacity) {
    int32_t count = 0;
    for (cudaStream_t stream : used)
        if (count++ < capacity) streams[count - 1] = stream;
    used.clear();
    return count;
}
}

namespace kvspn::emulation {
namespace {

constexpr size_t kStack = size_t(128) << 10;

// Those who meet: a warp or a block.
struct Meeting {
    int expected = 0, arrived = 0;
    std::vector<int> waiting;
};

struct Warp {
    Meeting meeting;
    uint64_t values[2][32];  // by turns, so that one meeting an exchange suffices
};

struct Fiber {
    void* stack;
    void* top;
    void* fake = nullptr;
    Place place;
    int turn = 0;
};

class Grid {
  public:
    Grid(int blocks, int threads, size_t shared, const std::function<void()>& kernel)
        : kernel_(kernel),
          random_(kvspn_emulation_seed),
          warps_(blocks * ((threads + 31) / 32)),
          meetings_(blocks) {
        for (int block = 0; block < blocks; ++block) {
            // Exactly as much as was asked for, full of NaN.
            shared_.emplace_back(new char[shared]);
            std::memset(shared_.back().get(), 0xff, shared);
            meetings_[block].expected = threads;
            for (int thread = 0; thread < threads; ++thread) {
                warp(block, thread, threads).meeting.expected++;
                fibers_.push_back(
                    {nullptr, nullptr, nullptr, {thread, threads, block, blocks, shared_.back().get()}});
            }
        }
        stacks_ = static_cast<char*>(mmap(nullptr, kStack * fibers_.size(), PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (stacks_ == MAP_FAILED) throw std::bad_alloc();
        for (size_t i = 0; i < fibers_.size(); ++i) {
            fibers_[i].stack = stacks_ + i * kStack;
            // Six registers, the address to return to, and the alignment that a called function expects.
            auto** top = reinterpret_cast<void**>(stacks_ + (i + 1) * kStack) - 8;
            top[6] = reinterpret_cast<void*>(&Grid::start);
            fibers_[i].top = top;
            ready_.push_back(int(i));
        }
    }
    ~Grid() { munmap(stacks_, kStack * fibers_.size()); }

    void run() {
        running = this;
        for (size_t left = fibers_.size(); left;) {
            if (ready_.empty()) {
                std::fputs("kvspn emulation: threads wait for others that never come\n", stderr);
                std::abort();
            }
            const size_t drawn = random_() % ready_.size();
            std::swap(ready_[drawn], ready_.back());
            current_ = ready_.back();
            ready_.pop_back();
            done_ = false;
            enter(fibers_[current_]);
            left -= done_;
        }
        running = nullptr;
    }

    const Place& place() { return fibers_[current_].place; }

    void yield() {
        ready_.push_back(current_);
        leave();
    }

    void sync_block() { meet(meetings_[place().block]); }

    void sync_warp() { meet(present_warp().meeting); }

    uint64_t exchange(uint64_t value, int lane) {
        Warp& w = present_warp();
        uint64_t* values = w.values[fibers_[current_].turn++ & 1];
        values[place().thread % 32] = value;
        meet(w.meeting);
        return values[lane & 31];
    }

    static Grid* running;

  private:
    Warp& warp(int block, int thread, int threads) {
        return warps_[block * ((threads + 31) / 32) + thread / 32];
    }
    Warp& present_warp() { return warp(place().block, place().thread, place().threads); }

    void meet(Meeting& meeting) {
        if (++meeting.arrived < meeting.expected) {
            meeting.waiting.push_back(current_);
            leave();
        } else {
            meeting.arrived = 0;
            ready_.insert(ready_.end(), meeting.waiting.begin(), meeting.waiting.end());
            meeting.waiting.clear();
        }
    }

    void enter(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
        void* fake;
        __sanitizer_start_switch_fiber(&fake, fiber.stack, kStack);
#endif
        kvspn_switch_stack(&scheduler_, fiber.top);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    }

    void leave() {
        Fiber& fiber = fibers_[current_];
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(done_ ? nullptr : &fiber.fake, home_, home_size_);
#endif
        kvspn_switch_stack(&fiber.top, scheduler_);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fiber.fake, &home_, &home_size_);
#endif
    }

    static void start() {
        Grid& grid = *running;
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(nullptr, &grid.home_, &grid.home_size_);
#endif
        grid.kernel_();
        grid.done_ = true;
        grid.leave();
    }

    const std::function<void()>& kernel_;
    std::mt19937 random_;
    std::vector<Warp> warps_;
    std::vector<Meeting> meetings_;
    std::vector<std::unique_ptr<char[]>> shared_;
    std::vector<Fiber> fibers_;
    std::vector<int> ready_;
    char* stacks_;
    void* scheduler_ = nullptr;
    const void* home_ = nullptr;
    size_t home_size_ = 0;
    int current_ = 0;
    bool done_ = false;
};

Grid* Grid::running = nullptr;

}  // namespace

const Place& place() { return Grid::running->place(); }
void sync_block() { Grid::running->sync_block(); }
void sync_warp() { Grid::running->sync_warp(); }
uint64_t exchange(uint64_t value, int lane) { return Grid::running->exchange(value, lane); }
void yield() { Grid::running->yield(); }
int64_t ticks() {
    static int64_t count = 0;
    return ++count;
}

}  // namespace kvspn::emulation

cudaError_t emulated_launch(const cudaLaunchConfig_t* config, std::function<void()> kernel) {
    const cudaLaunchConfig_t c = *config;
    if (c.dynamicSmemBytes > size_t(kvspn_emulation_shared_bytes)) return cudaErrorInvalidValue;
    if (kvspn_emulation_failing_launch >= 0 && kvspn_emulation_failing_launch-- == 0)
        return cudaErrorLaunchFailure;
    auto call = [c, kernel] {
        kvspn::emulation::Grid(int(c.gridDim.x), int(c.blockDim.x), c.dynamicSmemBytes, kernel).run();
    };
    if (c.stream && c.stream->captured) return c.stream->captured->calls.push_back(call), cudaSuccess;
    use(c.stream);
    kvspn_emulation_launched_on = kvspn_emulation_device, busy = true;
    call();
    return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaErrorInvalidValue:
            return "invalid argument";
        case cudaErrorMemoryAllocation:
            return "out of memory";
        default:
            return "unspecified launch failure";
    }
}

cudaError_t cudaGetDevice(int* device) { return *device = kvspn_emulation_device, cudaSuccess; }

cudaError_t cudaSetDevice(int device) { return kvspn_emulation_device = device, cudaSuccess; }

cudaError_t cudaDeviceSynchronize() { return busy = false, cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount            ? kvspn_emulation_multiprocessors
             : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? kvspn_emulation_shared_bytes
                                                                    : 9;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
    *pointer = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFree(void* pointer) { return std::free(pointer), cudaSuccess; }

cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return cudaMalloc(pointer, bytes); }

cudaError_t cudaFreeHost(void* pointer) {
    if (pointer && busy) {
        std::fputs("kvspn emulation: pinned memory is freed while kernels may use it\n", stderr);
        std::abort();
    }
    return cudaFree(pointer);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    use(stream);
    return std::memcpy(to, from, bytes), cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream) {
    use(stream);
    return std::memset(pointer, value, bytes), cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    return *stream = new EmulatedStream, cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) { return delete stream, cudaSuccess; }

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return use(stream), busy = false, cudaSuccess; }

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, int) {
    return stream->captured = new EmulatedGraph, cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    *graph = stream->captured;
    stream->captured = nullptr;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
    return *exec = new EmulatedGraph(*graph), cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    use(stream);
    kvspn_emulation_launched_on = kvspn_emulation_device, busy = true;
    for (auto& call : exec->calls) call();
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete exec, cudaSuccess; }
