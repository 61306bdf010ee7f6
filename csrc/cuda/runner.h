// Plans on a CUDA device. The batch is in its memory; the weights are copied to it from the host's.
#pragma once

#include <sys/types.h>

#include <vector>

#include "common/runner.h"
#include "cuda/kernels.h"
#include "kvspn.h"

namespace kvspn::cuda {

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

// Everything but the weights, which are there once the runner is, is put on the caller's stream. It belongs
// to the device that was present when it was made, and to the process: a device is lost to a fork's child.
class CudaRunner : public Runner {
  public:
    CudaRunner(const kvspn_engine_params& params, Weights& weights, const Plan& plan);
    ~CudaRunner() override;

    bool asynchronous() const override { return true; }
    void set_stream(void* stream) override { stream_ = static_cast<cudaStream_t>(stream); }
    void bind(const Batch& batch) override;
    void encode(int row, const kvspn_tensor& states) override;
    void prefill(int row, int first, int count, int position, float* logits) override;
    void run(const kvspn_step_params& params, int steps) override;
    std::vector<Timing> profile(const kvspn_step_params& params) override;
    Shown shown(int row) const override;
    void forget(int row, int count) override;
    void set_rule(int row, const RowRule& rule) override;
    void write(void* to, const void* from, size_t bytes) override;
    void read(void* to, const void* from, size_t bytes) const override;
    void wait() const override;

  private:
    enum class Mode { persistent, graph, kernels };

    Buffer& keep(Buffer buffer);
    Matrix upload(const Matrix& matrix);
    Norm upload(const Norm& norm);
    Table upload(const kvspn::Table& table);
    const float* upload(const float* values, int count);
    void upload_weights();

    OnDevice here() const;
    size_t most_queries() const {
        return std::max<size_t>(kPrefillChunk, size_t(queries_) * size_t(batch_.rows));
    }
    void reserve(int queries_of_row);
    void place_stages();
    Stage placed(const kvspn::Stage& stage) const;
    std::pair<float*, int64_t> place(Place place) const;
    void append_cross(int layer, int row, int64_t count);
    void launch_stages(int first, int last, const Pass& pass, cudaStream_t stream);

    const Mode mode_;
    const Device device_;
    const pid_t process_;
    cudaStream_t stream_ = nullptr;
    std::vector<Buffer> weight_memory_;
    Weights& weights_;  // their pointers are the device's
    const Plan& plan_;
    Model model_{};
    Batch batch_{};
    int64_t inner_stride_, wide_stride_;
    int queries_ = 0;  // of a row, at most, that there is memory for

    std::vector<Stage> stages_;  // of the plan, on the present batch
    Buffer placed_, control_, x_, wide_, attended_, inner_, best_, draft_best_, drafts_, above_, partials_,
        arrived_, barrier_, states_, projected_, rules_, parts_, scores_, draft_logits_, kept_;
    Pinned progress_;
    Control present_{};
    bool controlled_ = false;
    bool cut_ = false;                // Some row is: there is memory for logits.
    Graph graphs_[1 + kMostQueries];  // with the draft network, and by the number of queries without it
};

}  // namespace kvspn::cuda
