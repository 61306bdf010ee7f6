#include "common/weights.h"

#include <cmath>

#include "common/error.h"
#include "common/fp16.h"

namespace kvspn {
namespace {

constexpr int kSpan = 512;       // 512 products of int8 and int16 fit into an int32
constexpr int kInt4Span = 8192;  // and 8192 of int4

// A row of elements of `size` bytes, `stride` elements apart.
void copy_row(char* to, const char* from, int64_t count, int64_t stride, size_t size) {
    if (stride == 1 || count == 1) {
        std::memcpy(to, from, size_t(count) * size);
        return;
    }
    for (int64_t c = 0; c < count; ++c) std::memcpy(to + c * size, from + c * stride * int64_t(size), size);
}

// What of a row packing moves at once, a column or a pair: of each output of a tile one piece.
template <int kBytes>
int64_t interleave_pieces(const kvspn_tensor& tensor, int64_t pieces, int64_t size, const Matrix& matrix,
                          char* to) {
    for (int64_t first = 0; first < matrix.outputs; first += kLanes) {
        const char* rows = static_cast<const char*>(tensor.data) + first * tensor.strides[0] * size;
        const int64_t lanes = std::min<int64_t>(kLanes, matrix.outputs - first),
                      row = tensor.strides[0] * size;
        char* tile = to + first * matrix.columns * size;
        for (int64_t piece = 0; piece < pieces; ++piece, tile += kLanes * kBytes)
            for (int64_t lane = 0; lane < lanes; ++lane)
                std::memcpy(tile + lane * kBytes, rows + lane * row + piece * kBytes, kBytes);
    }
    return pieces * kBytes / size;
}

// The columns from the first that lie side by side in memory, packed: how many, all but an odd last one.
int64_t interleave(const kvspn_tensor& tensor, int64_t columns, const Matrix& matrix, char* to) {
    if (tensor.strides[1] != 1) return 0;
    const int64_t size = int64_t(size_of(matrix.dtype)), each = format_of(matrix.dtype).paired ? 2 : 1;
    switch (size * each) {
        case 1:
            return interleave_pieces<1>(tensor, columns, size, matrix, to);
        case 2:
            return interleave_pieces<2>(tensor, columns / each, size, matrix, to);
        default:
            return interleave_pieces<4>(tensor, columns / each, size, matrix, to);
    }
}

}  // namespace

void Table::add(int row, float* x) const {
    const int64_t first = int64_t(row) * width;
    for (int c = 0; c < width; ++c) {
        switch (dtype) {
            case Dtype::bf16:
                x[c] += bf16_to_float(static_cast<const uint16_t*>(rows)[first + c]);
                break;
            case Dtype::fp16:
                x[c] += fp16_to_float(static_cast<const uint16_t*>(rows)[first + c]);
                break;
            default:
                x[c] += static_cast<const float*>(rows)[first + c];
        }
    }
}

Weights::Weights(const kvspn_engine_params& params, const kvspn_tensor* tensors, int count, Layout layout)
    : architecture(params), layout_(layout) {
    require(count >= 0 && (tensors || !count), "weights must be ", count, " tensors, got a null pointer");
    for (int i = 0; i < count; ++i) {
        require(tensors[i].name, "weights[", i, "] must have a name, got a null pointer");
        tensors_[tensors[i].name] = &tensors[i];
    }
    tokens = read_table("embed_tokens");
    width = tokens.width;
    vocabulary = tokens.count;
    const Architecture& a = architecture;
    if (!a.rotary_base) {
        positions = read_table("embed_positions");
        require(positions.width == width, "embed_positions must be ", width, " wide, got ", positions.width);
    }
    require(width % a.heads == 0, "embed_tokens must be a multiple of ", a.heads, " heads wide, got ", width);
    head_dim = width / a.heads;
    require(!a.rotary_base || head_dim % 2 == 0, "rotary_base must be 0 with heads of an odd width, got ",
            a.rotary_base);
    const int d = width;
    for (int i = 0; i < a.layers; ++i) {
        const std::string name = "layers." + std::to_string(i) + ".";
        Layer layer;
        layer.self_norm = read_norm(name + "self_norm");
        layer.self_qkv = read_matrix(name + "self_qkv", d + 2 * a.key_heads * head_dim, d);
        layer.self_out = read_matrix(name + "self_out", d, d);
        if (a.cross) {
            layer.cross_norm = read_norm(name + "cross_norm");
            layer.cross_q = read_matrix(name + "cross_q", d, d);
            layer.cross_kv = read_matrix(name + "cross_kv", 2 * d, d);
            layer.cross_out = read_matrix(name + "cross_out", d, d);
        }
        read_feed_forward(name, layer.ffn_norm, layer.fc1, layer.fc2);
        layers.push_back(layer);
    }
    norm = read_norm("norm");
    head = read_matrix("head", vocabulary, d);
    for (int i = 0; i < a.blocks; ++i) {
        const std::string name = "blocks." + std::to_string(i) + ".";
        Block block;
        block.kv_norm = read_norm(name + "kv_norm");
        const int query = rows_of(name + "kv_q");
        require(query && query % d == 0, name, "kv_q must have a multiple of ", d, " outputs, got ", query);
        block.kv_q = read_matrix(name + "kv_q", query, d);
        block.kv_out = read_matrix(name + "kv_out", d, query);
        block.cross = a.cross && find(name + "cross_q.weight");
        if (block.cross) {
            const int cross = rows_of(name + "cross_q");
            require(cross && cross % d == 0, name, "cross_q must have a multiple of ", d, " outputs, got ",
                    cross);
            block.cross_norm = read_norm(name + "cross_norm");
            block.cross_q = read_matrix(name + "cross_q", cross, d);
            block.cross_out = read_matrix(name + "cross_out", d, cross);
        }
        read_feed_forward(name, block.ffn_norm, block.fc1, block.fc2);
        blocks.push_back(block);
    }
    if (a.blocks) {
        draft_norm = read_norm("draft_norm");
        draft_head = head;
        if (find("draft_head.weight")) {
            const kvspn_tensor* ids = find("draft_ids");
            draft_head = read_matrix("draft_head", ids ? rows_of("draft_head") : vocabulary, d);
            if (ids) {
                check_tensor("draft_ids", *ids, {Dtype::int32}, {draft_head.outputs});
                int32_t* own = memory_.take<int32_t>(draft_head.outputs);
                for (int i = 0; i < draft_head.outputs; ++i) {
                    const int32_t id = static_cast<const int32_t*>(ids->data)[i * ids->strides[0]];
                    require(id >= 0 && id < vocabulary, "draft_ids must be tokens, got ", id);
                    own[i] = id;
                }
                draft_ids = own;
            }
        }
    }
    tensors_.clear();
}

const kvspn_tensor* Weights::find(const std::string& name) const {
    auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : found->second;
}

int Weights::rows_of(const std::string& name) const {
    const kvspn_tensor* tensor = find(name + ".weight");
    require(tensor, name, ".weight must be among the weights, got nothing");
    require(tensor->ndim == 2 && tensor->shape[0] > 0 && tensor->shape[0] < (1 << 30), name,
            ".weight must be a matrix, got another shape");
    return int(tensor->shape[0]);
}

const kvspn_tensor& Weights::get(const std::string& name, std::initializer_list<int64_t> shape) const {
    const kvspn_tensor* tensor = find(name);
    require(tensor, name, " must be among the weights, got nothing");
    check_tensor(name, *tensor, kFloats, shape);
    return *tensor;
}

const float* Weights::vector(const std::string& name, int size) {
    const kvspn_tensor& tensor = get(name, {size});
    float* own = memory_.take<float>(size);
    read_rows(tensor, 1, size, own, 0);
    return own;
}

Norm Weights::read_norm(const std::string& name) {
    return {vector(name + ".weight", width), architecture.rms_norm ? nullptr : vector(name + ".bias", width)};
}

void Weights::read_feed_forward(const std::string& name, Norm& norm, Matrix& fc1, Matrix& fc2) {
    norm = read_norm(name + "ffn_norm");
    const int rows = rows_of(name + "fc1");
    require(!architecture.gated || rows % (2 * kLanes) == 0, name, "fc1 must have a multiple of ", 2 * kLanes,
            " outputs with gated, got ", rows);
    fc1 = read_matrix(name + "fc1", rows, width);
    fc2 = read_matrix(name + "fc2", width, architecture.gated ? rows / 2 : rows);
}

Matrix Weights::read_matrix(const std::string& name, int outputs, int columns) {
    const kvspn_tensor* tensor = find(name + ".weight");
    require(tensor, name, ".weight must be among the weights, got nothing");
    const bool int4 = tensor->dtype == int(Dtype::int4);
    require(!int4 || columns % 2 == 0, name, ".weight must have an even number of columns in int4, got ",
            columns);
    check_tensor(name + ".weight", *tensor, kWeights, {outputs, int4 ? columns / 2 : columns});
    Matrix matrix;
    matrix.dtype = Dtype(tensor->dtype);
    matrix.outputs = outputs;
    matrix.inputs = columns;
    matrix.columns = is_integer(matrix.dtype) ? pad(columns, kDepth) : columns;
    if (find(name + ".bias")) matrix.bias = vector(name + ".bias", outputs);
    const bool scaled = format_of(matrix.dtype).scales != Scales::none;
    require(bool(find(name + ".scale")) == scaled, name, ".scale must be given with ", kScaledWeights,
            " alone, got ", scaled ? "none" : "one");
    if (layout_ == Layout::rows) {
        copy_rows(name, *tensor, columns, matrix);
        return matrix;
    }
    if (scaled) read_scale(name, columns, matrix);
    pack(*tensor, columns, matrix);
    return matrix;
}

void Weights::copy_rows(const std::string& name, const kvspn_tensor& tensor, int columns, Matrix& matrix) {
    const bool int4 = matrix.dtype == Dtype::int4;
    if (format_of(matrix.dtype).scales == Scales::outputs)
        matrix.scale = vector(name + ".scale", matrix.outputs);
    if (int4) {
        const kvspn_tensor& scale = get(name + ".scale", {matrix.outputs, -1});
        const int groups = int(scale.shape[1]);
        matrix.span = groups ? columns / groups : 0;
        require(
            matrix.span >= kDepth && !(matrix.span & (matrix.span - 1)) && matrix.span * groups == columns,
            name, ".scale must divide the ", columns, " columns into groups of 8, 16, 32, ..., got ", groups,
            " groups");
        float* own = memory_.take<float>(size_t(matrix.outputs) * groups);
        read_rows(scale, matrix.outputs, groups, own, groups);
        matrix.scale = own;
    }
    const int64_t size = int64_t(size_of(matrix.dtype)), count = tensor.shape[1];
    const int64_t pitch = pad(int(count * size), 16);
    matrix.columns = int(pitch / size) * (int4 ? 2 : 1);
    char* own = memory_.take<char>(size_t(matrix.outputs * pitch));
    const char* from = static_cast<const char*>(tensor.data);
    for (int64_t output = 0; output < matrix.outputs; ++output)
        copy_row(own + output * pitch, from + output * tensor.strides[0] * size, count, tensor.strides[1],
                 size_t(size));
    matrix.weight = own;
}

void Weights::read_scale(const std::string& name, int columns, Matrix& matrix) {
    const bool int4 = matrix.dtype == Dtype::int4;
    const kvspn_tensor& scale =
        int4 ? get(name + ".scale", {matrix.outputs, -1}) : get(name + ".scale", {matrix.outputs});
    matrix.span = is_integer(matrix.dtype) ? kSpan : matrix.columns;
    if (int4) {
        const int64_t groups = scale.shape[1];
        require(groups && columns % (groups * kDepth) == 0 && columns / groups <= kInt4Span, name,
                ".scale must divide the ", columns, " columns into groups of a multiple of ", kDepth,
                ", at most ", kInt4Span, ", got ", groups, " groups");
        matrix.span = columns / int(groups);
    }
    const int spans = (matrix.columns + matrix.span - 1) / matrix.span;
    float* own = memory_.take<float>(size_t(pad(matrix.outputs, kLanes)) * spans);
    for (int output = 0; output < matrix.outputs; ++output)
        for (int span = 0; span < spans; ++span)
            own[(output / kLanes * spans + span) * kLanes + output % kLanes] =
                element(scale, output * scale.strides[0] + (int4 ? span * scale.strides[1] : 0));
    matrix.scale = own;
}

// The tensor's weights in the order that Matrix describes.
void Weights::pack(const kvspn_tensor& tensor, int columns, Matrix& matrix) {
    const bool int4 = matrix.dtype == Dtype::int4;
    const size_t size = size_of(matrix.dtype);
    char* own =
        memory_.take<char>(size_t(pad(matrix.outputs, kLanes)) * matrix.columns * size / (int4 ? 2 : 1));
    const int64_t interleaved = int4 ? 0 : interleave(tensor, columns, matrix, own);
    for (int64_t output = 0; output < matrix.outputs; ++output) {
        const int64_t tile = output / kLanes * kLanes * matrix.columns, lane = output % kLanes;
        const int64_t from = output * tensor.strides[0];
        if (int4) {
            for (int64_t c = 0; c < columns; ++c) {
                const uint8_t byte =
                    static_cast<const uint8_t*>(tensor.data)[from + c / 2 * tensor.strides[1]];
                const int nibble = ((c % 2 ? byte >> 4 : byte & 15) - 8) & 15;
                const int64_t word = (tile + c / kDepth * kDepth * kLanes) / 4 + 2 * lane + c % 2;
                reinterpret_cast<uint16_t*>(own)[word] |= uint16_t(nibble << c % kDepth / 2 * 4);
            }
            continue;
        }
        const bool pairs = format_of(matrix.dtype).paired;
        for (int64_t c = interleaved; c < columns; ++c) {
            const bool paired = pairs && (c | 1) < matrix.columns;
            const int64_t place = paired ? (c - c % 2) * kLanes + 2 * lane + c % 2 : c * kLanes + lane;
            std::memcpy(
                own + (tile + place) * size,
                static_cast<const char*>(tensor.data) + (from + c * tensor.strides[1]) * int64_t(size), size);
        }
    }
    matrix.weight = own;
}

Table Weights::read_table(const std::string& name) {
    const kvspn_tensor& tensor = get(name, {-1, -1});
    require(tensor.shape[0] >= 1 && tensor.shape[1] >= 1 && tensor.shape[0] < (1 << 30) &&
                tensor.shape[1] < (1 << 20),
            name, " must not be empty, got ", tensor.shape[0], " x ", tensor.shape[1]);
    Table table{Dtype(tensor.dtype), nullptr, int(tensor.shape[0]), int(tensor.shape[1])};
    const size_t size = size_of(table.dtype);
    char* own = memory_.take<char>(size_t(table.count) * table.width * size);
    const char* from = static_cast<const char*>(tensor.data);
    for (int64_t row = 0; row < table.count; ++row)
        copy_row(own + row * table.width * size, from + row * tensor.strides[0] * int64_t(size), table.width,
                 tensor.strides[1], size);
    table.rows = own;
    return table;
}

}  // namespace kvspn
