// A model as one file, mapped: safetensors, as kvspn/models/one_file.py writes it.
#pragma once

#include <initializer_list>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "common/tensor.h"
#include "kvspn.h"

namespace kvspn {

class ModelFile {
  public:
    // Throws InvalidArgument for what is no such file, or a damaged one.
    explicit ModelFile(const char* path);
    ~ModelFile();
    ModelFile(const ModelFile&) = delete;

    // In the mapped file, with names that live as long as this.
    std::vector<kvspn_tensor> tensors() const;
    const kvspn_tensor& tensor(const std::string& name, std::initializer_list<Dtype> dtypes,
                               std::initializer_list<int64_t> shape) const;

    // What it says under a name; throws InvalidArgument where that is not from `low` to `high`.
    int number(const std::string& name, int64_t low, int64_t high) const;
    // All numbers whose names begin so, by the rest of their names.
    std::map<std::string, int> numbers(const std::string& prefix, int64_t low, int64_t high) const;

  private:
    void read(std::string_view header, char* data, size_t size);

    void* mapped_ = nullptr;
    size_t bytes_ = 0;
    std::map<std::string, kvspn_tensor> tensors_;
    std::map<std::string, std::string> said_;
};

}  // namespace kvspn
