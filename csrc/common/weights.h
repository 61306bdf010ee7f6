// Named tensors of the caller -> the decoder's weights, packed for the kernels.
#pragma once

#include <string>
#include <unordered_map>
#include <vector>

#include "common/architecture.h"
#include "common/matrix.h"
#include "common/memory.h"
#include "common/tensor.h"
#include "kvspn.h"

namespace kvspn {

struct Norm {
    const float *weight = nullptr, *bias = nullptr;  // no bias: RMSNorm
};

struct Layer {
    Norm self_norm, cross_norm, ffn_norm;
    Matrix self_qkv, self_out, cross_q, cross_kv, cross_out, fc1, fc2;
};

struct Block {
    Norm kv_norm, cross_norm, ffn_norm;
    Matrix kv_q, kv_out, cross_q, cross_out, fc1, fc2;
    bool cross = false;
};

// Rows of floats in their own format: the embeddings.
struct Table {
    Dtype dtype = Dtype::fp32;
    const void* rows = nullptr;
    int count = 0, width = 0;
    void add(int row, float* x) const;  // x[0 .. width) += the row
};

// Of a matrix in memory: as the CPU's kernels read it, or its rows as they are, each filled up to 16 bytes.
enum class Layout { packed, rows };

struct Weights {
    Weights(const kvspn_engine_params& params, const kvspn_tensor* tensors, int count,
            Layout layout = Layout::packed);

    // Frees what the pointers below point to, for who has copied it.
    void release() { memory_.clear(); }

    Architecture architecture;
    int width, head_dim, vocabulary;
    Table tokens, positions;  // these are empty where positions are rotary
    std::vector<Layer> layers;
    std::vector<Block> blocks;
    Norm norm, draft_norm;
    Matrix head, draft_head;
    const int32_t* draft_ids = nullptr;

  private:
    const kvspn_tensor* find(const std::string& name) const;
    const kvspn_tensor& get(const std::string& name, std::initializer_list<int64_t> shape) const;
    const float* vector(const std::string& name, int size);
    Norm read_norm(const std::string& name);
    void read_feed_forward(const std::string& name, Norm& norm, Matrix& fc1, Matrix& fc2);
    Matrix read_matrix(const std::string& name, int outputs, int columns);
    void read_scale(const std::string& name, int columns, Matrix& matrix);
    void pack(const kvspn_tensor& tensor, int columns, Matrix& matrix);
    void copy_rows(const std::string& name, const kvspn_tensor& tensor, int columns, Matrix& matrix);
    int rows_of(const std::string& name) const;
    Table read_table(const std::string& name);

    Layout layout_;
    std::unordered_map<std::string, const kvspn_tensor*> tensors_;  // valid while constructing
    Arena memory_;
};

}  // namespace kvspn
