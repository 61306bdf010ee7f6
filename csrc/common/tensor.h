// Tensors of the caller: checks, and elements in any format.
#pragma once

#include <initializer_list>
#include <string>

#include "common/matrix.h"
#include "kvspn.h"

namespace kvspn {

// Bytes of an element in a tensor, whose int4 comes in pairs.
constexpr size_t size_of(Dtype dtype) { return size_t(format_of(dtype).bits + 7) / 8; }

constexpr int64_t kAny = -1;  // size of a dimension
constexpr int64_t kMostSize = int64_t(1) << 30, kMostElements = int64_t(1) << 40;

// Throws InvalidArgument unless the tensor has one of the dtypes and the shape. Sizes are then so small, at
// most kMostSize in a dimension and kMostElements in all, strides included, that no later product wraps.
void check_tensor(const std::string& name, const kvspn_tensor& tensor, std::initializer_list<Dtype> dtypes,
                  std::initializer_list<int64_t> shape);

// Throws InvalidArgument unless its elements lie one behind the other.
void check_contiguous(const std::string& name, const kvspn_tensor& tensor);

// Whether an optional tensor is there.
inline bool given(const kvspn_tensor& tensor) { return tensor.data || tensor.ndim; }

// Every `stride`-th row from the `first`.
kvspn_tensor every(int stride, int first, const kvspn_tensor& tensor);
float bf16_to_float(uint16_t bits);
float element(const kvspn_tensor& tensor, int64_t index);
void store(Dtype dtype, void* out, int64_t index, float value);  // rounds to nearest

// The tensor's last two dimensions as floats, row after row of `columns`.
void read_rows(const kvspn_tensor& tensor, int64_t rows, int64_t columns, float* out, int64_t stride);

}  // namespace kvspn
