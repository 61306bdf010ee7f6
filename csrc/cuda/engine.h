// The decoder step on a CUDA device. The batch is in its memory; the weights are copied to it from the
// host's.
#pragma once

#include <vector>

#include "common/weights.h"
#include "cuda/kernels.h"
#include "kvspn.h"

namespace kvspn {

constexpr int kPrefillChunk = 16;  // query tokens of one pass

namespace cuda {

class Buffer {
  public:
    Buffer() = default;
    Buffer(size_t bytes, cudaStream_t stream);  // zeros
    Buffer(const void* from, size_t bytes, cudaStream_t stream);
    Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_);
        return *this;
    }
    ~Buffer() { cudaFree(data_); }

    template <class T>
    T* as() const {
        return static_cast<T*>(data_);
    }

  private:
    void* data_ = nullptr;
};

// Of the host, where the device can write.
class Pinned {
  public:
    Pinned() = default;
    explicit Pinned(size_t bytes);  // zeros
    Pinned(const Pinned&) = delete;
    Pinned& operator=(Pinned&& other) noexcept {
        std::swap(data_, other.data_);
        return *this;
    }
    ~Pinned() { cudaFreeHost(data_); }

    template <class T>
    T* as() const {
        return static_cast<T*>(data_);
    }

  private:
    void* data_ = nullptr;
};

// Makes a device the present one, until it goes.
class OnDevice {
  public:
    explicit OnDevice(int index);
    OnDevice(const OnDevice&) = delete;
    ~OnDevice();

  private:
    int before_;
};

// One that does not wait for the default stream.
class Stream {
  public:
    Stream();
    Stream(const Stream&) = delete;
    ~Stream() { cudaStreamDestroy(stream_); }
    operator cudaStream_t() const { return stream_; }

  private:
    cudaStream_t stream_ = nullptr;
};

// A step captured once, for as long as no address changes.
class Graph {
  public:
    Graph() = default;
    Graph(const Graph&) = delete;
    ~Graph() { reset(); }
    template <class Body>
    void launch(Body capture, cudaStream_t on);
    void reset();

  private:
    cudaGraphExec_t exec_ = nullptr;
};

}  // namespace cuda

const char* instruction_set();

// Everything but the weights, which are there once the engine is, is put on the caller's stream. It belongs
// to the device that was present when it was made.
class Engine {
  public:
    Engine(const kvspn_engine_params& params, const kvspn_tensor* weights, int count);
    ~Engine();

    void set_stream(void* stream) { stream_ = static_cast<cudaStream_t>(stream); }
    void bind(const kvspn_batch& batch);
    void encode(int row, const kvspn_tensor& states);
    void prefill(int row, int count);
    void step(const kvspn_step_params& params) { run(params, 1); }
    // Waits for it. Each stage is followed by the barrier behind it.
    int profile(const kvspn_step_params& params, kvspn_stage* stages, int capacity);
    void generate(const kvspn_generate_params& params);
    void rollback(int row, int length);
    void reset();
    void read_statistics(int row, kvspn_statistics& statistics) const;
    int progress(int row, int32_t* tokens, int capacity) const;

  private:
    enum class Mode { persistent, graph, kernels };

    cuda::Buffer& keep(cuda::Buffer buffer);
    Matrix upload(const Matrix& matrix);
    Norm upload(const Norm& norm);
    cuda::Table upload(const Table& table);
    const float* upload(const float* values, int count);

    void check_bound() const;
    void check_row(int row) const;
    void check_step(const kvspn_step_params& params) const;
    void run(const kvspn_step_params& params, int steps);
    void plan();
    void add_embed(bool draft);
    void add_linear(const char* name, const Norm* norm, const float* x, int64_t x_stride,
                    const Matrix& matrix, float* y, int64_t y_stride, bool gelu, bool accumulate);
    void add_attend(const char* name, bool cross, int layer, int layers, int query_heads, bool causal);
    void add_verify(bool draft, const Norm& norm, const Matrix& head);
    void launch_stages(int first, int last, const cuda::Pass& pass, cudaStream_t stream);
    int64_t bytes_of(const cuda::Stage& stage, const std::vector<int64_t>& positions) const;
    void fetch(void* to, const void* from, size_t bytes) const;
    void wait(const char* what) const;
    void check_tokens(int row) const;
    void append_cross(int layer, int row, int64_t count);
    void set(int32_t* at, int32_t value);
    char* layer_kv(bool cross, int layer) const;
    float* layer_scale(bool cross, int layer) const;
    int64_t layer_positions(bool cross) const;

    Mode mode_;
    cuda::Device device_;
    cudaStream_t stream_ = nullptr;
    std::vector<cuda::Buffer> weight_memory_;
    Weights weights_;  // their pointers are the device's
    cuda::Model model_{};
    kvspn_batch batch_{};
    kvspn_tensor kv_scale_{}, cross_kv_scale_{};  // those of the batch, which the caller's struct points to
    int vocabulary_, hidden_stride_, query_stride_;

    std::vector<cuda::Stage> stages_;  // the draft network's, the base model's, what follows
    int base_ = 0, judge_ = 0;         // where the second and the third begin
    bool drafting_ = false;            // while they are made: for the draft network
    cuda::Buffer plan_, control_, x_, wide_, attended_, hidden_, best_, draft_best_, above_, partials_,
        arrived_, barrier_, states_, projected_;
    cuda::Pinned progress_;
    std::vector<int> prefilled_;  // tokens of each row
    cuda::Control present_{};
    bool controlled_ = false;
    cuda::Graph graphs_[2];  // plain, with a draft
};

}  // namespace kvspn
