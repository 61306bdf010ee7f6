#include "common/tensor.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "common/error.h"
#include "common/fp16.h"

namespace kvspn {
namespace {

std::string describe(const int64_t* sizes, size_t count) {
    std::string text = "[";
    for (size_t i = 0; i < count; ++i)
        text += (i ? ", " : "") + (sizes[i] < 0 ? std::string("any") : std::to_string(sizes[i]));
    return text + "]";
}

}  // namespace

void check_tensor(const std::string& name, const kvspn_tensor& tensor, std::initializer_list<Dtype> dtypes,
                  std::initializer_list<int64_t> shape) {
    bool known = false;
    std::string wanted;
    for (Dtype dtype : dtypes) {
        known |= tensor.dtype == int(dtype);
        wanted += (wanted.empty() ? "" : " or ") + std::string(format_of(dtype).name);
    }
    bool named = tensor.dtype >= 0 && tensor.dtype < int(std::size(kFormats));
    require(known, name, " must be ", wanted, ", got ",
            named ? kFormats[tensor.dtype].name : "an unknown dtype");
    bool fits = tensor.ndim == int(shape.size());
    for (size_t i = 0; fits && i < shape.size(); ++i)
        fits = tensor.shape[i] >= 0 && (shape.begin()[i] == kAny || tensor.shape[i] == shape.begin()[i]);
    bool countable = tensor.ndim >= 0 && tensor.ndim <= KVSPN_MAX_DIMS;
    require(fits, name, " must have shape ", describe(shape.begin(), shape.size()), ", got ",
            countable ? describe(tensor.shape, tensor.ndim) : "too many dimensions");
    int64_t elements = 1, reach = 0;  // reach: the farthest element, by the strides
    for (int i = 0; i < tensor.ndim; ++i) {
        const int64_t size = tensor.shape[i], stride = tensor.strides[i];
        require(size <= kMostSize, name, " must have at most 2^30 elements in dimension ", i, ", got ", size);
        require(!size || elements <= kMostElements / size, name, " must have at most 2^40 elements, got ",
                describe(tensor.shape, tensor.ndim));
        elements *= size;
        require(stride >= -kMostElements && stride <= kMostElements, name,
                " must have strides of at most 2^40, got ", stride);
        const int64_t step = stride < 0 ? -stride : stride, steps = size - 1;
        require(steps <= 0 || step <= (kMostElements - reach) / steps, name,
                " must lie within 2^40 elements, got stride ", stride, " in dimension ", i);
        if (steps > 0) reach += step * steps;
    }
    require(tensor.data || !elements, name, " must have data, got a null pointer");
}

void read_rows(const kvspn_tensor& tensor, int64_t rows, int64_t columns, float* out, int64_t stride) {
    const int64_t last = tensor.strides[tensor.ndim - 1];
    const int64_t step = tensor.ndim > 1 ? tensor.strides[tensor.ndim - 2] : 0;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) out[r * stride + c] = element(tensor, r * step + c * last);
}

void check_contiguous(const std::string& name, const kvspn_tensor& tensor) {
    if (std::find(tensor.shape, tensor.shape + tensor.ndim, 0) != tensor.shape + tensor.ndim) return;
    int64_t stride = 1;
    for (int i = tensor.ndim - 1; i >= 0; --i) {
        require(tensor.shape[i] <= 1 || tensor.strides[i] == stride, name, " must be contiguous, got stride ",
                tensor.strides[i], " in dimension ", i);
        stride *= tensor.shape[i];
    }
}

kvspn_tensor every(int stride, int first, const kvspn_tensor& tensor) {
    kvspn_tensor rows = tensor;
    rows.data =
        static_cast<char*>(tensor.data) + first * tensor.strides[0] * int64_t(size_of(Dtype(tensor.dtype)));
    rows.shape[0] = (tensor.shape[0] - first + stride - 1) / stride, rows.strides[0] *= stride;
    return rows;
}

float bf16_to_float(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

float element(const kvspn_tensor& tensor, int64_t index) {
    switch (Dtype(tensor.dtype)) {
        case Dtype::bf16:
            return bf16_to_float(static_cast<const uint16_t*>(tensor.data)[index]);
        case Dtype::fp16:
            return fp16_to_float(static_cast<const uint16_t*>(tensor.data)[index]);
        case Dtype::int8:
            return static_cast<const int8_t*>(tensor.data)[index];
        default:
            return static_cast<const float*>(tensor.data)[index];
    }
}

void store(Dtype dtype, void* out, int64_t index, float value) {
    switch (dtype) {
        case Dtype::bf16: {
            uint32_t bits;
            std::memcpy(&bits, &value, sizeof bits);
            const bool nan = value != value;  // rounding must not turn it into an infinity
            static_cast<uint16_t*>(out)[index] =
                nan ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
            break;
        }
        case Dtype::fp16:
            static_cast<uint16_t*>(out)[index] = float_to_fp16(value);
            break;
        default:
            static_cast<float*>(out)[index] = value;
    }
}

}  // namespace kvspn
