// Launches of the kernels. What the device reports is thrown with the kernel's name.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#elif defined(KVSPN_EMULATE)
#include "cuda/emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

#include <stdexcept>
#include <string>

#include "cuda/plan.h"

namespace kvspn::cuda {

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

struct Device {
    int index, multiprocessors, shared_bytes;
    int threads;   // of a block
    bool overlap;  // a kernel may start before the one ahead of it in the stream has ended
};

// The present device, with what kernels may use of it.
Device open_device();

// Floats of activations that fit beside the rest of a block's memory, with a plan of `stages` in it.
int shared_floats(const Device& device, int stages);

// One kernel for one stage.
void launch_stage(const Device& device, Model model, const Stage& stage, const Pass& pass,
                  cudaStream_t stream);

// One cooperative kernel for `steps` times all the stages, or until every row is finished.
void launch_steps(const Device& device, const Model& model, const Stage* stages, int count, const Pass& pass,
                  int steps, cudaStream_t stream);

// [rows, columns] with strides in elements -> fp32 [rows, out_stride].
void launch_to_float(const Device& device, const Table& from, int columns, int64_t row_stride,
                     int64_t column_stride, float* out, int64_t out_stride, cudaStream_t stream);

}  // namespace kvspn::cuda
