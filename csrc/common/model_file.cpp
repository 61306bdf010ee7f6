#include "common/model_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "common/error.h"

namespace kvspn {
namespace {

constexpr struct {
    const char* name;
    Dtype dtype;
} kDtypes[] = {{"F32", Dtype::fp32}, {"BF16", Dtype::bf16},   {"F16", Dtype::fp16}, {"I8", Dtype::int8},
               {"U8", Dtype::int4},  {"F8_E4M3", Dtype::fp8}, {"I32", Dtype::int32}};

// A safetensors header: JSON of objects, lists, whole numbers, and strings without escapes.
class Header {
  public:
    explicit Header(std::string_view text) : rest_(text) {}

    bool skip(char wanted) {
        trim();
        if (rest_.empty() || rest_[0] != wanted) return false;
        rest_.remove_prefix(1);
        return true;
    }
    void expect(char wanted) {
        require(skip(wanted), "the model's header must go on with ", wanted, ", got '", rest_.substr(0, 20),
                "'");
    }
    std::string string() {
        expect('"');
        const size_t end = rest_.find_first_of("\"\\");
        require(end != rest_.npos && rest_[end] == '"',
                "the model's header must have strings that end, without \\, got '", rest_.substr(0, 20), "'");
        const std::string text(rest_.substr(0, end));
        rest_.remove_prefix(end + 1);
        return text;
    }
    int64_t number() {
        trim();
        const size_t digits = std::min(rest_.find_first_not_of("0123456789"), rest_.size());
        require(digits >= 1 && digits <= 18, "the model's header must have whole numbers there, got '",
                rest_.substr(0, 20), "'");
        const int64_t value = std::stoll(std::string(rest_.substr(0, digits)));
        rest_.remove_prefix(digits);
        return value;
    }
    // Calls read(key) for each entry of an object.
    template <class Read>
    void object(const Read& read) {
        expect('{');
        if (skip('}')) return;
        do {
            const std::string key = string();
            expect(':');
            read(key);
        } while (skip(','));
        expect('}');
    }
    std::vector<int64_t> list() {
        std::vector<int64_t> values;
        expect('[');
        if (skip(']')) return values;
        do values.push_back(number());
        while (skip(','));
        expect(']');
        return values;
    }

  private:
    void trim() { rest_.remove_prefix(std::min(rest_.find_first_not_of(" \t\r\n"), rest_.size())); }

    std::string_view rest_;
};

// Closes what it holds.
struct Descriptor {
    int number;
    ~Descriptor() {
        if (number >= 0) close(number);
    }
};

}  // namespace

ModelFile::ModelFile(const char* path) {
    const Descriptor file{open(path, O_RDONLY | O_CLOEXEC)};
    struct stat status{};
    require(file.number >= 0 && !fstat(file.number, &status), "path must be a file that can be read, got ",
            path, ": ", std::strerror(errno));
    require(S_ISREG(status.st_mode) && status.st_size > 8, "path must be a model's file, got ", path);
    bytes_ = size_t(status.st_size);
    mapped_ = mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, file.number, 0);
    if (mapped_ == MAP_FAILED) mapped_ = nullptr;
    require(mapped_, "path must be a file that can be mapped, got ", path, ": ", std::strerror(errno));
    try {
        char* bytes = static_cast<char*>(mapped_);
        uint64_t length;
        std::memcpy(&length, bytes, sizeof length);
        require(length <= bytes_ - 8, "path must be a safetensors file, which begins with the length of its ",
                "header, got ", path);
        read({bytes + 8, size_t(length)}, bytes + 8 + length, bytes_ - 8 - size_t(length));
    } catch (...) {
        munmap(mapped_, bytes_);
        throw;
    }
}

ModelFile::~ModelFile() { munmap(mapped_, bytes_); }

void ModelFile::read(std::string_view text, char* data, size_t size) {
    Header header(text);
    header.object([&](const std::string& name) {
        if (name == "__metadata__") {
            header.object([&](const std::string& key) { said_[key] = header.string(); });
            return;
        }
        std::string kind;
        std::vector<int64_t> shape, range;
        header.object([&](const std::string& key) {
            if (key == "dtype")
                kind = header.string();
            else if (key == "shape")
                shape = header.list();
            else
                range = header.list();
        });
        kvspn_tensor tensor{};
        tensor.dtype = -1;
        for (const auto& each : kDtypes)
            if (kind == each.name) tensor.dtype = int32_t(each.dtype);
        require(tensor.dtype >= 0, name, " must be F32, BF16, F16, I8, U8, F8_E4M3 or I32, got '", kind, "'");
        require(shape.size() <= KVSPN_MAX_DIMS, name, " must have at most ", KVSPN_MAX_DIMS,
                " dimensions, got ", shape.size());
        tensor.ndim = int32_t(shape.size());
        const int64_t each = int64_t(size_of(Dtype(tensor.dtype)));
        int64_t count = 1;
        for (size_t i = shape.size(); i-- > 0;) {
            tensor.shape[i] = shape[i], tensor.strides[i] = count;
            require(!shape[i] || count <= kMostElements / shape[i], name,
                    " must have at most 2^40 elements, got more");
            count *= shape[i];
        }
        require(range.size() == 2 && range[0] <= range[1] && uint64_t(range[1]) <= size &&
                    range[1] - range[0] == count * each,
                name, " must lie in ", count * each, " of the file's ", size, " bytes, got other offsets");
        tensor.data = data + range[0];
        require(uintptr_t(tensor.data) % uintptr_t(each) == 0, name, " must lie at a multiple of ", each,
                " bytes, got another place");
        const auto [place, fresh] = tensors_.emplace(name, tensor);
        require(fresh, name, " must be in the file once, got it twice");
        place->second.name = place->first.c_str();
    });
}

std::vector<kvspn_tensor> ModelFile::tensors() const {
    std::vector<kvspn_tensor> all;
    for (const auto& [name, tensor] : tensors_) all.push_back(tensor);
    return all;
}

const kvspn_tensor& ModelFile::tensor(const std::string& name, std::initializer_list<Dtype> dtypes,
                                      std::initializer_list<int64_t> shape) const {
    const auto found = tensors_.find(name);
    require(found != tensors_.end(), name, " must be in the model's file, got none");
    check_tensor(name, found->second, dtypes, shape);
    return found->second;
}

int ModelFile::number(const std::string& name, int64_t low, int64_t high) const {
    const auto found = said_.find(name);
    require(found != said_.end(), name,
            " must be said in the file's metadata, got nothing: ", "`kvspn quantize` writes such files");
    const std::string& text = found->second;
    char* end = nullptr;
    const long long value = std::strtoll(text.c_str(), &end, 10);
    require(!text.empty() && end == text.c_str() + text.size() && value >= low && value <= high, name,
            " must be ", low, " to ", high, " in the file's metadata, got '", text, "'");
    return int(value);
}

std::map<std::string, int> ModelFile::numbers(const std::string& prefix, int64_t low, int64_t high) const {
    std::map<std::string, int> found;
    for (auto at = said_.lower_bound(prefix);
         at != said_.end() && !at->first.compare(0, prefix.size(), prefix); ++at)
        found[at->first.substr(prefix.size())] = number(at->first, low, high);
    return found;
}

}  // namespace kvspn
