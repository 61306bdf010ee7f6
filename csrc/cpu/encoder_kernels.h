// The CPU's encoder kernels behind one table, a table for each instruction set: matrices and attention on
// blocks of rows.
//
// Rows of activations are operands there, 32-bit words that a kernel multiplies with every output at once: a
// float, two bf16 or two int16, four int8. Which of them, and how the weights lie, is the instruction set's
// own. An output is one fixed chain of operations, whatever the block.
#pragma once

#include <cstdint>

#include "common/matrix.h"

namespace kvspn {

constexpr int kBlock = 64;             // rows, or queries, that a kernel takes at most
constexpr int kKeys = 256;             // of a block of keys, between which the softmax is carried on
constexpr int kTwoTiles = 2 * kLanes;  // outputs that a kernel makes at once

// Bytes between the operands of two rows: rows a power of two apart would share few lines of the cache.
static constexpr int64_t operand_stride(int words) { return int64_t(words) * 4 + 64; }

// `rows` <= kBlock rows of x -> y = x W^T + bias [-> GELU] [+ added].
struct LinearBlock {
    const BlockMatrix* matrix = nullptr;
    int rows = 0;
    const float* x = nullptr;
    float* y = nullptr;
    const float* added = nullptr;  // may be y
    int64_t x_stride = 0, y_stride = 0, added_stride = 0;
    bool gelu = false;
    char* operand = nullptr;  // scratch [kBlock, operand_stride]
};

// Of one head, as `split` leaves it: queries as operands, keys and values as weights. Positions are padded to
// whole blocks, with zeros.
struct HeadBlock {
    Dtype format = Dtype::fp32;
    int width = 0, positions = 0;  // positions: all that there are
    int first = 0, rows = 0;       // of the block
    char *queries = nullptr, *keys = nullptr, *values = nullptr;
    const float *q = nullptr, *k = nullptr, *v = nullptr;  // split: of the block's first row
    int64_t stride = 0;
    float* out = nullptr;  // attend: of the block's first row, [rows, width]
    int64_t out_stride = 0;
    char* scratch = nullptr;  // attend: kAttendScratch bytes and 4 * kBlock * pad(width)
};
constexpr int64_t kAttendScratch =
    int64_t(kBlock) * (kKeys * int64_t(sizeof(float)) + operand_stride(kKeys) + 64);

struct HeadBytes {
    int64_t queries, keys, values;
};

struct EncoderKernels {
    const char* name;
    // Bytes of a row's operand, in words, for a matrix of so many inputs.
    int (*words)(Dtype format, int inputs);
    // Bytes of the weights of pad(outputs) outputs.
    int64_t (*weight_bytes)(Dtype format, int outputs, int inputs);
    // rows [outputs, inputs] -> weights, zeroed before; of int8 also their scales and offsets.
    void (*pack)(Dtype format, const float* rows, int outputs, int inputs, void* weight, float* scale,
                 int32_t* offset);
    void (*linear)(const LinearBlock& block);
    // What a head's queries, keys and values take, of so many positions, a multiple of kBlock.
    HeadBytes (*head_bytes)(Dtype format, int width, int positions);
    void (*split)(const HeadBlock& block);
    void (*attend)(const HeadBlock& block);
};

extern const EncoderKernels portable_encoder, avx2_encoder, avx512_encoder, avx512vnni_encoder,
    avx512bf16_encoder, amx_encoder;

// As select_kernels; "avx512bf16" and "amx" are instruction sets of the encoder alone.
const EncoderKernels& select_encoder_kernels(const char* variant);

}  // namespace kvspn
