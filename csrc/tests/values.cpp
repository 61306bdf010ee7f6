// Hashes of what the engine and the ops compute from reproducible numbers, a line for each format: the same
// text from every compiler and every processor that has fused multiply-add.
#include <cstring>
#include <map>

#include "model.h"

namespace {

const std::map<std::string, int32_t> kFormats = {{"fp32", KVSPN_FP32}, {"bf16", KVSPN_BF16},
                                                 {"fp16", KVSPN_FP16}, {"int8", KVSPN_INT8},
                                                 {"int4", KVSPN_INT4}, {"fp8", KVSPN_FP8}};
bool has_scales(int32_t dtype) { return dtype == KVSPN_INT8 || dtype == KVSPN_INT4 || dtype == KVSPN_FP8; }
bool is_cache(int32_t dtype) { return dtype != KVSPN_INT4 && dtype != KVSPN_FP8; }

// FNV-1a.
uint64_t hash(const void* data, size_t bytes, uint64_t so_far = 0xcbf29ce484222325) {
    for (size_t i = 0; i < bytes; ++i)
        so_far = (so_far ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001b3;
    return so_far;
}

int64_t count(const kvspn_tensor& t) {
    int64_t elements = 1;
    for (int i = 0; i < t.ndim; ++i) elements *= t.shape[i];
    return elements;
}

// Reproducible values of any format, and their scales, all of a size that a model can use.
struct Values {
    std::vector<uint32_t> data;
    std::vector<float> scales;

    Values(int32_t dtype, int64_t elements, int64_t scale_count) : data(elements + 1), scales(scale_count) {
        Noise noise;
        auto* bytes = reinterpret_cast<uint8_t*>(data.data());
        for (int64_t i = 0; i < elements; ++i) {
            const float value = noise.next();
            uint32_t bits;
            std::memcpy(&bits, &value, sizeof bits);
            const uint16_t bf16 = uint16_t(bits >> 16);
            // Exponents of 2^-9 to 2^-2, and 0, which is that of a subnormal.
            const uint16_t exponent = i % 17 ? uint16_t(6 + (bits >> 4) % 8) : 0;
            const uint16_t fp16 = uint16_t((bf16 & 0x8000) | exponent << 10 | (bits >> 8 & 0x3ff));
            if (dtype == KVSPN_FP32) std::memcpy(bytes + 4 * i, &value, 4);
            if (dtype == KVSPN_BF16) std::memcpy(bytes + 2 * i, &bf16, 2);
            if (dtype == KVSPN_FP16) std::memcpy(bytes + 2 * i, &fp16, 2);
            if (dtype == KVSPN_INT8) bytes[i] = uint8_t(int8_t(value * 254));
            if (dtype == KVSPN_INT4) bytes[i] = uint8_t(bits >> 8);
            // Exponents up to 2^7, and what would be NaN as a subnormal value.
            if (dtype == KVSPN_FP8)
                bytes[i] = uint8_t(bits >> 8) & ((bits >> 8 & 0x70) == 0x70 ? 0x87 : 0xff);
        }
        for (float& scale : scales) scale = (1.5f + noise.next()) / (dtype == KVSPN_INT4 ? 16 : 256);
    }
};

// The model with its matrices in a format, decoding into caches of another.
void engine(const std::string& name, int32_t weights, const std::string& cache_name, int32_t cache) {
    const Model model;
    std::deque<std::string> names;
    std::deque<Values> values;
    std::vector<kvspn_tensor> tensors;
    for (const kvspn_tensor& t : model.tensors()) {
        const std::string tensor_name = t.name;
        const size_t dot = tensor_name.rfind(".weight");
        if (t.ndim != 2 || dot == std::string::npos || weights == KVSPN_FP32) {
            tensors.push_back(t);
            continue;
        }
        const int64_t rows = t.shape[0], groups = weights == KVSPN_INT4 ? 2 : 1;
        const int64_t columns = weights == KVSPN_INT4 ? t.shape[1] / 2 : t.shape[1];
        values.emplace_back(weights, rows * columns, rows * groups);
        tensors.push_back(tensor(t.name, values.back().data.data(), weights, {rows, columns}));
        if (!has_scales(weights)) continue;
        names.push_back(tensor_name.substr(0, dot) + ".scale");
        const std::vector<int64_t> shape =
            weights == KVSPN_INT4 ? std::vector<int64_t>{rows, groups} : std::vector<int64_t>{rows};
        tensors.push_back(tensor(names.back().c_str(), values.back().scales.data(), KVSPN_FP32, shape));
    }
    const kvspn_engine_params params{sizeof params,    kLayers, kHeads, 1, 1, 0, 1, 0,
                                     KVSPN_DEVICE_CPU, nullptr};
    kvspn_engine* made = nullptr;
    CHECK(kvspn_engine_create(&params, tensors.data(), int32_t(tensors.size()), &made) == KVSPN_OK);

    Batch batch(made);
    kvspn_batch view = batch.view();
    std::vector<float> kv(count(view.kv)), cross(count(view.cross_kv)), scales(count(view.kv)),
        cross_scales = cross;
    const std::vector<int64_t> shape(view.kv.shape, view.kv.shape + 5),
        cross_shape(view.cross_kv.shape, view.cross_kv.shape + 5);
    const kvspn_tensor kv_scale = tensor("kv_scale", scales.data(), KVSPN_FP32, shape),
                       cross_scale = tensor("cross_kv_scale", cross_scales.data(), KVSPN_FP32, cross_shape);
    view.kv.data = kv.data(), view.cross_kv.data = cross.data();
    view.kv.dtype = view.cross_kv.dtype = cache;
    if (cache == KVSPN_INT8) view.kv_scale = &kv_scale, view.cross_kv_scale = &cross_scale;
    CHECK(kvspn_engine_bind(made, &view) == KVSPN_OK);
    const std::vector<int32_t> tokens = batch.generate(1);
    uint64_t all = hash(tokens.data(), tokens.size() * sizeof(int32_t));
    for (const std::vector<float>* each : {&kv, &cross, &scales, &cross_scales})
        all = hash(each->data(), each->size() * sizeof(float), all);
    std::printf("engine %s, cache %s: %016llx\n", name.c_str(), cache_name.c_str(), (unsigned long long)all);
    kvspn_engine_destroy(made);
}

// Rows of activations through a matrix of a format, with all that fused_linear can do.
void linear(const std::string& name, int32_t dtype) {
    constexpr int64_t kIn = 96, kOut = 37, kBatch = 5;
    Values x(KVSPN_FP32, kBatch * kIn, 0), norm(KVSPN_FP32, kIn, 0), bias(KVSPN_FP32, kOut, 0);
    const int64_t columns = dtype == KVSPN_INT4 ? kIn / 2 : kIn, groups = dtype == KVSPN_INT4 ? 3 : 1;
    Values weight(dtype, kOut * columns, kOut * groups);
    std::vector<float> out(kBatch * kOut);
    kvspn_linear_params params{};
    params.struct_size = sizeof params;
    params.x = tensor("x", x.data.data(), KVSPN_FP32, {kBatch, kIn});
    params.weight = tensor("weight", weight.data.data(), dtype, {kOut, columns});
    params.out = tensor("out", out.data(), KVSPN_FP32, {kBatch, kOut});
    if (has_scales(dtype))
        params.scale =
            tensor("scale", weight.scales.data(), KVSPN_FP32,
                   dtype == KVSPN_INT4 ? std::vector<int64_t>{kOut, groups} : std::vector<int64_t>{kOut});
    params.bias = tensor("bias", bias.data.data(), KVSPN_FP32, {kOut});
    params.norm_weight = tensor("norm_weight", norm.data.data(), KVSPN_FP32, {kIn});
    params.norm_bias = tensor("norm_bias", norm.data.data(), KVSPN_FP32, {kIn});
    params.eps = 1e-5f, params.gelu = 1;
    CHECK(kvspn_fused_linear(&params) == KVSPN_OK);
    std::printf("linear %s: %016llx\n", name.c_str(),
                (unsigned long long)hash(out.data(), out.size() * sizeof(float)));
}

// Queries of the usual head width over two layers of a cache.
void attention(const std::string& name, int32_t dtype) {
    constexpr int64_t kCacheLayers = 2, kBatch = 2, kCacheHeads = 2, kQueryRows = 3, kPositions = 21,
                      kHead = 64;
    const int32_t floats = dtype == KVSPN_INT8 ? int32_t(KVSPN_FP32) : dtype;
    constexpr int64_t kCacheRows = kCacheLayers * 2 * kBatch * kCacheHeads * kPositions;
    Values q(floats, kBatch * kCacheHeads * kQueryRows * kHead, 0), kv(dtype, kCacheRows * kHead, kCacheRows);
    int32_t lengths[kBatch] = {18, 7};
    std::vector<float> out(kBatch * kQueryRows * kCacheHeads * kHead);
    const kvspn_tensor scale =
        tensor("kv_scale", kv.scales.data(), KVSPN_FP32, {kCacheLayers, 2, kBatch, kCacheHeads, kPositions});
    kvspn_attention_params params{};
    params.struct_size = sizeof params;
    params.q = tensor("q", q.data.data(), floats, {kBatch, kCacheHeads, kQueryRows, kHead});
    params.kv =
        tensor("kv", kv.data.data(), dtype, {kCacheLayers, 2, kBatch, kCacheHeads, kPositions, kHead});
    params.lengths = tensor("lengths", lengths, KVSPN_INT32, {kBatch});
    params.out = tensor("out", out.data(), floats, {kBatch, kQueryRows, kCacheHeads * kHead});
    params.scale = 0.125f, params.causal = 1;
    if (dtype == KVSPN_INT8) params.kv_scale = &scale;
    CHECK(kvspn_flat_kv_attention(&params) == KVSPN_OK);
    std::printf("attention %s: %016llx\n", name.c_str(),
                (unsigned long long)hash(out.data(), out.size() * sizeof(float)));
}

// fp32 alone: bf16 and int8 meet the products that an instruction set has for them.
void encoder() {
    const Model model;
    kvspn_encoder* made = model.encoder(KVSPN_FP32, 1);
    Sound sound;
    CHECK(sound.encode(made) == KVSPN_OK);
    std::printf("encoder fp32: %016llx\n",
                (unsigned long long)hash(sound.states.data(), sound.states.size() * sizeof(float)));
    kvspn_encoder_destroy(made);
}

}  // namespace

int main() {
    for (const auto& [name, weights] : kFormats)
        for (const auto& [cache_name, cache] : kFormats)
            if (is_cache(cache)) engine(name, weights, cache_name, cache);
    for (const auto& [name, dtype] : kFormats) linear(name, dtype);
    for (const auto& [name, dtype] : kFormats)
        if (is_cache(dtype)) attention(name, dtype);
    encoder();
}
