// kvspn._native: the engine for Python. It takes NumPy's arrays and any DLPack tensor, and imports nothing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/dlpack.h"
#include "kvspn.h"

namespace py = pybind11;

namespace {

// Kinds of memory, as DLPack counts them: the host's, and that of an engine for CUDA.
constexpr int kCpu = 1;
#if defined(KVSPN_EMULATE)
constexpr int kCuda = kCpu;
#else
constexpr int kCuda = 2;
#endif

void check(kvspn_status status) {
    if (status == KVSPN_OK) return;
    if (status == KVSPN_INVALID_ARGUMENT || status == KVSPN_NO_TOKEN)
        throw py::value_error(kvspn_last_error());
    if (status == KVSPN_OUT_OF_MEMORY) throw std::bad_alloc();
    throw std::runtime_error(kvspn_last_error());
}

// Other Python threads run meanwhile.
template <class Call>
void without_gil(Call call) {
    kvspn_status status;
    {
        py::gil_scoped_release release;
        status = call();
    }
    check(status);
}

int32_t dtype_of(const std::string& name, DLDataType dtype) {
    if (dtype.lanes == 1) {
        if (dtype.code == 2 && dtype.bits == 32) return KVSPN_FP32;
        if (dtype.code == 4 && dtype.bits == 16) return KVSPN_BF16;
        if (dtype.code == 2 && dtype.bits == 16) return KVSPN_FP16;
        if (dtype.code == 0 && dtype.bits == 8) return KVSPN_INT8;
        if (dtype.code == 1 && dtype.bits == 8) return KVSPN_INT4;
        if (dtype.code == 1 && dtype.bits == 16) return KVSPN_BF16;
        if (dtype.code == 0 && dtype.bits == 32) return KVSPN_INT32;
        if (dtype.code == 6 && dtype.bits == 8) return KVSPN_BOOL;
        if (dtype.code == 10 && dtype.bits == 8) return KVSPN_FP8;
    }
    throw py::type_error(name +
                         " must be fp32, bf16 (or its bits in uint16), fp16, int8, fp8 (e4m3), int4 (in "
                         "uint8), int32 or bool, "
                         "got another dtype");
}

// What a buffer's format (struct's) and item size are in DLPack's terms.
DLDataType dlpack_dtype(const std::string& format, ssize_t size) {
    // Some libraries say in front that the byte order is the machine's; another one has its own sign.
    const bool marked = format.size() == 2 && (format[0] == '=' || format[0] == '@');
    const char kind = marked ? format[1] : format.size() == 1 ? format[0] : '\0';
    if (kind == '\0') return {};
    const uint8_t code = kind == '?' ? 6 : std::strchr("efd", kind) ? 2 : std::strchr("BHILQ", kind) ? 1 : 0;
    return {code, uint8_t(8 * size), 1};
}

// A tensor of the caller; holds what keeps its memory alive.
class Tensor {
  public:
    // written: whether the engine writes it. device: the memory that it must be in.
    Tensor(std::string name, const py::object& object, int device, bool written = false)
        : name_(std::move(name)) {
        if (PyObject_CheckBuffer(object.ptr()))
            take_buffer(object, written, device);
        else if (py::hasattr(object, "__dlpack__"))
            take_dlpack(object, device);
        else
            throw py::type_error(name_ + " must be an array with a buffer or a tensor with __dlpack__, got " +
                                 std::string(py::str(py::type::of(object).attr("__name__"))));
    }
    const kvspn_tensor& get() const { return tensor_; }

  private:
    // Of NumPy, whose read-only arrays and mapped files DLPack does not carry in every version.
    void take_buffer(const py::object& object, bool written, int device) {
        check_device(kCpu, device);
        if (PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_RECORDS_RO)) throw py::error_already_set();
        if (written && buffer_.readonly)
            throw py::value_error(name_ + " must be writable, got a read-only array");
        check_dims(buffer_.ndim);
        tensor_.name = name_.c_str();
        tensor_.data = buffer_.buf;
        tensor_.dtype = dtype_of(name_, dlpack_dtype(buffer_.format, buffer_.itemsize));
        tensor_.ndim = buffer_.ndim;
        for (int i = 0; i < buffer_.ndim; ++i) {
            if (buffer_.strides[i] % buffer_.itemsize)
                throw py::value_error(name_ + " must have strides of whole elements, got a field of another");
            tensor_.shape[i] = buffer_.shape[i];
            tensor_.strides[i] = buffer_.strides[i] / buffer_.itemsize;
        }
    }

    void take_dlpack(const py::object& object, int device) {
        capsule_ = object.attr("__dlpack__")();
        auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
        if (!managed) throw py::error_already_set();
        const DLTensor& from = managed->dl_tensor;
        check_device(from.device.device_type, device);
        check_dims(from.ndim);
        tensor_.name = name_.c_str();
        tensor_.data = static_cast<char*>(from.data) + from.byte_offset;
        tensor_.dtype = dtype_of(name_, from.dtype);
        tensor_.ndim = from.ndim;
        int64_t stride = 1;
        for (int i = from.ndim - 1; i >= 0; --i) {
            tensor_.shape[i] = from.shape[i];
            tensor_.strides[i] = from.strides ? from.strides[i] : stride;
            stride *= from.shape[i];
        }
    }

    void check_device(int found, int wanted) const {
        if (found != wanted)
            throw py::value_error(name_ + " must be on " + (wanted == kCpu ? "the CPU" : "a CUDA device") +
                                  ", got another device");
    }

    void check_dims(int dims) const {
        if (dims > KVSPN_MAX_DIMS)
            throw py::value_error(name_ + " must have at most 6 dimensions, got " + std::to_string(dims));
    }

    struct Buffer : Py_buffer {
        Buffer() : Py_buffer{} {}
        Buffer(const Buffer&) = delete;
        Buffer& operator=(const Buffer&) = delete;
        ~Buffer() {
            if (obj) PyBuffer_Release(this);
        }
    };

    std::string name_;
    Buffer buffer_;
    py::object capsule_;  // its own destructor calls the deleter, as it is never renamed
    kvspn_tensor tensor_{};
};

using Tensors = std::vector<std::unique_ptr<Tensor>>;

struct Free {
    void operator()(kvspn_engine* engine) const { kvspn_engine_destroy(engine); }
};

void take_weights(const py::dict& weights, Tensors& held, std::vector<kvspn_tensor>& tensors) {
    for (auto& [name, value] : weights) {
        held.push_back(
            std::make_unique<Tensor>(py::cast<std::string>(name), py::cast<py::object>(value), kCpu));
        tensors.push_back(held.back()->get());
    }
}

// NumPy has no fp8: uint8 holds int4 beside a scale [N, groups], and the bits of fp8 beside a scale [N].
void find_fp8(std::vector<kvspn_tensor>& tensors) {
    std::map<std::string, int32_t> dims;
    for (const kvspn_tensor& tensor : tensors) dims[tensor.name] = tensor.ndim;
    for (kvspn_tensor& tensor : tensors) {
        std::string name = tensor.name;
        const size_t end = name.rfind(".weight");
        if (tensor.dtype != KVSPN_INT4 || end == std::string::npos) continue;
        const auto scale = dims.find(name.replace(end, std::string::npos, ".scale"));
        if (scale != dims.end() && scale->second == 1) tensor.dtype = KVSPN_FP8;
    }
}

class Engine {
  public:
    Engine(const py::dict& weights, int layers, int heads, int blocks, int groups, bool last_layer_only,
           int threads, int encoder_stride, int key_heads, bool rms_norm, float norm_eps, bool gated,
           float rotary_base, bool cross, const std::string& device,
           const std::optional<std::string>& variant)
        : device_(device == "cuda" ? kCuda : kCpu) {
        if (device != "cpu" && device != "cuda")
            throw py::value_error("device must be cpu or cuda, got " + device);
        Tensors held;
        std::vector<kvspn_tensor> tensors;
        take_weights(weights, held, tensors);
        find_fp8(tensors);
        kvspn_engine_params params{};
        params.struct_size = sizeof params;
        params.layers = layers, params.heads = heads, params.blocks = blocks, params.groups = groups;
        params.last_layer_only = last_layer_only, params.threads = threads;
        params.encoder_stride = encoder_stride;
        params.key_heads = key_heads, params.rms_norm = rms_norm, params.norm_eps = norm_eps;
        params.gated = gated, params.rotary_base = rotary_base, params.no_cross = !cross;
        params.device = device == "cuda" ? KVSPN_DEVICE_CUDA : KVSPN_DEVICE_CPU;
        params.variant = variant ? variant->c_str() : nullptr;
        kvspn_engine* engine = nullptr;
        without_gil(
            [&] { return kvspn_engine_create(&params, tensors.data(), int32_t(tensors.size()), &engine); });
        engine_.reset(engine);
        for (const kvspn_tensor& tensor : tensors)
            if (std::string(tensor.name) == "embed_tokens") vocabulary_ = tensor.shape[0];
    }

    void set_stream(uintptr_t stream) {
        check(kvspn_engine_set_stream(engine_.get(), reinterpret_cast<void*>(stream)));
    }

    void bind(const py::object& kv, const py::object& lengths, const py::object& tokens,
              const py::object& finished, const py::object& stats, const py::object& cross_kv,
              const py::object& cross_lengths, const py::object& kv_scale, const py::object& cross_kv_scale,
              const py::object& cross_queries) {
        Tensors held;
        auto add = [&](const char* name, const py::object& value) {
            held.push_back(std::make_unique<Tensor>(name, value, device_, true));
            return held.back()->get();
        };
        auto optional = [&](const char* name, const py::object& value) -> const kvspn_tensor* {
            if (value.is_none()) return nullptr;
            held.push_back(std::make_unique<Tensor>(name, value, device_, true));
            return &held.back()->get();
        };
        kvspn_batch batch{sizeof batch,
                          add("kv", kv),
                          add("lengths", lengths),
                          add("tokens", tokens),
                          add("finished", finished),
                          add("stats", stats),
                          add("cross_kv", cross_kv),
                          add("cross_lengths", cross_lengths),
                          optional("kv_scale", kv_scale),
                          optional("cross_kv_scale", cross_kv_scale),
                          optional("cross_queries", cross_queries)};
        check(kvspn_engine_bind(engine_.get(), &batch));
        batch_ = std::move(held);
    }

    void encode(int row, const py::object& states) {
        Tensor tensor("states", states, device_);
        without_gil([&] { return kvspn_engine_encode(engine_.get(), row, &tensor.get()); });
    }

    void prefill(int row, int count, int first, int position, const py::object& logits) {
        if (logits.is_none())
            return without_gil(
                [&] { return kvspn_engine_prefill_from(engine_.get(), row, first, count, 0, nullptr); });
        Tensor tensor("logits", logits, device_, true);
        without_gil([&] {
            return kvspn_engine_prefill_from(engine_.get(), row, first, count, position, &tensor.get());
        });
    }

    void set_rule(int row, float temperature, uint64_t seed, int begin, int text_end, int max_initial,
                  int prefix, int top_k) {
        const kvspn_rule rule{sizeof rule, temperature, seed, begin, text_end, max_initial, prefix, top_k};
        check(kvspn_engine_set_rule(engine_.get(), row, &rule));
    }

    // What steps choose under, until the next call: masks of all tokens, and where log-probabilities go.
    void choose(const py::object& mask, const py::object& first_mask, const py::object& log_probs) {
        Chosen chosen{take_mask("mask", mask), take_mask("first_mask", first_mask), nullptr};
        if (!log_probs.is_none())
            chosen.log_probs = std::make_unique<Tensor>("log_probs", log_probs, device_, true);
        chosen_ = std::move(chosen);
    }

    void step(int k, int eos, int max_length, bool draft) { run(k, eos, max_length, draft, 1); }

    void verify(const py::object& draft_tokens, int k, int eos, int max_length) {
        const Tensor drafts("draft_tokens", draft_tokens, device_);
        const kvspn_step_params params = step_params(k, eos, max_length, false, &drafts.get());
        without_gil([&] { return kvspn_engine_step(engine_.get(), &params); });
    }

    void run(int k, int eos, int max_length, bool draft, int steps) {
        kvspn_generate_params params{};
        params.struct_size = sizeof params;
        params.step = step_params(k, eos, max_length, draft);
        params.max_steps = steps;
        without_gil([&] { return kvspn_engine_generate(engine_.get(), &params); });
    }

    // (name, nanoseconds, bytes) of each stage of a step; it runs, or is planned and takes no time.
    using Stages = std::vector<std::tuple<std::string, int64_t, int64_t>>;
    Stages profile(int k, int eos, int max_length, bool draft) {
        return list_stages(&kvspn_engine_profile, step_params(k, eos, max_length, draft));
    }
    Stages plan(int max_length, bool draft) {
        return list_stages(&kvspn_engine_plan, step_params(1, -1, max_length, draft));
    }

    std::vector<int32_t> progress(int row) const {
        int32_t count = 0;
        check(kvspn_engine_progress(engine_.get(), row, nullptr, 0, &count));
        std::vector<int32_t> tokens(static_cast<size_t>(count));
        check(kvspn_engine_progress(engine_.get(), row, tokens.data(), count, &count));
        return tokens;
    }

  private:
    Stages list_stages(decltype(&kvspn_engine_profile) list, const kvspn_step_params& params) {
        std::vector<kvspn_stage> stages(4096);
        int32_t count = 0;
        without_gil(
            [&] { return list(engine_.get(), &params, stages.data(), int32_t(stages.size()), &count); });
        Stages listed;
        for (int i = 0; i < std::min(count, int32_t(stages.size())); ++i)
            listed.emplace_back(stages[i].name, stages[i].nanoseconds, stages[i].bytes);
        return listed;
    }

    using Held = std::unique_ptr<Tensor>;
    struct Chosen {
        Held mask, first_mask, log_probs;
    };

    kvspn_step_params step_params(int k, int eos, int max_length, bool draft,
                                  const kvspn_tensor* draft_tokens = nullptr) const {
        const auto mask = [](const Held& held) {
            return held ? static_cast<const float*>(held->get().data) : nullptr;
        };
        return {sizeof(kvspn_step_params),
                mask(chosen_.mask),
                k,
                eos,
                max_length,
                draft,
                draft_tokens,
                mask(chosen_.first_mask),
                chosen_.log_probs ? &chosen_.log_probs->get() : nullptr};
    }

    Held take_mask(const char* name, const py::object& mask) const {
        if (mask.is_none()) return nullptr;
        auto held = std::make_unique<Tensor>(name, mask, device_);
        const kvspn_tensor& t = held->get();
        if (t.dtype != KVSPN_FP32 || t.ndim != 1 || t.shape[0] != vocabulary_ ||
            (t.shape[0] > 1 && t.strides[0] != 1))
            throw py::value_error(std::string(name) + " must be fp32 and contiguous, [" +
                                  std::to_string(vocabulary_) + "], got another tensor");
        return held;
    }

    const int device_;
    Tensors batch_;  // outlives its use by the engine
    Chosen chosen_;
    std::unique_ptr<kvspn_engine, Free> engine_;
    int64_t vocabulary_ = 0;
};

class Encoder {
  public:
    Encoder(const py::dict& weights, int layers, int heads, const std::string& format, int threads,
            bool output_positions, const std::optional<std::string>& variant) {
        const std::map<std::string, int32_t> formats = {
            {"fp32", KVSPN_FP32}, {"bf16", KVSPN_BF16}, {"int8", KVSPN_INT8}};
        const auto found = formats.find(format);
        if (found == formats.end()) throw py::value_error("format must be fp32, bf16 or int8, got " + format);
        Tensors held;
        std::vector<kvspn_tensor> tensors;
        take_weights(weights, held, tensors);
        kvspn_encoder_params params{};
        params.struct_size = sizeof params;
        params.layers = layers, params.heads = heads, params.format = found->second;
        params.threads = threads, params.output_positions = output_positions;
        params.variant = variant ? variant->c_str() : nullptr;
        kvspn_encoder* encoder = nullptr;
        without_gil(
            [&] { return kvspn_encoder_create(&params, tensors.data(), int32_t(tensors.size()), &encoder); });
        encoder_.reset(encoder);
    }

    void log_mel(const py::object& samples, const py::object& features) {
        const Tensor from("samples", samples, kCpu), to("features", features, kCpu, true);
        without_gil([&] { return kvspn_encoder_log_mel(encoder_.get(), &from.get(), &to.get()); });
    }

    void encode(const py::object& features, const py::object& states) {
        const Tensor from("features", features, kCpu), to("states", states, kCpu, true);
        without_gil([&] { return kvspn_encoder_encode(encoder_.get(), &from.get(), &to.get()); });
    }

    std::string instruction_set() const { return kvspn_encoder_instruction_set(encoder_.get()); }

  private:
    struct Destroy {
        void operator()(kvspn_encoder* encoder) const { kvspn_encoder_destroy(encoder); }
    };
    std::unique_ptr<kvspn_encoder, Destroy> encoder_;
};

// What a segment of the C ABI says, for as long as Python likes.
struct Segment {
    double start, end;
    std::string text;
    std::vector<int32_t> tokens;
    float avg_logprob, no_speech_prob;
    std::string language;
    float language_probability;
    bool cut;
};

class Model {
  public:
    Model(const std::string& path, int threads, const std::optional<std::string>& variant) {
        const kvspn_model_params params{sizeof params, threads, variant ? variant->c_str() : nullptr};
        kvspn_model* model = nullptr;
        without_gil([&] { return kvspn_model_open(path.c_str(), &params, &model); });
        model_.reset(model);
    }

    std::vector<Segment> transcribe(const py::object& samples, const std::optional<std::string>& language,
                                    const std::optional<std::string>& target, bool without_timestamps) {
        const Tensor sound("samples", samples, kCpu);
        const kvspn_tensor& own = sound.get();
        if (own.dtype != KVSPN_FP32 || own.ndim != 1 || (own.shape[0] > 1 && own.strides[0] != 1))
            throw py::value_error("samples must be fp32 and contiguous, of one dimension, got another array");
        std::vector<Segment> segments;
        kvspn_transcribe_params params{};
        params.struct_size = sizeof params, params.without_timestamps = without_timestamps;
        params.language = language ? language->c_str() : nullptr;
        params.target = target ? target->c_str() : nullptr;
        params.on_segment = [](void* context, const kvspn_segment* s) -> int32_t {
            static_cast<std::vector<Segment>*>(context)->push_back({s->start,
                                                                    s->end,
                                                                    s->text,
                                                                    {s->tokens, s->tokens + s->token_count},
                                                                    s->avg_logprob,
                                                                    s->no_speech_prob,
                                                                    s->language,
                                                                    s->language_probability,
                                                                    s->cut != 0});
            return 0;
        };
        params.context = &segments;
        kvspn_statistics
            statistics{};  // the model's own only where the call was made: another may be under way
        statistics.struct_size = sizeof statistics;
        params.statistics = &statistics;
        without_gil([&] {
            return kvspn_transcribe(model_.get(), static_cast<const float*>(own.data), own.shape[0], &params);
        });
        statistics_ = statistics;
        return segments;
    }

    // Of the last call that was made: tokens, steps, drafted, accepted.
    std::tuple<int64_t, int64_t, int64_t, int64_t> statistics() const {
        return {statistics_.tokens, statistics_.steps, statistics_.drafted, statistics_.accepted};
    }

  private:
    struct Close {
        void operator()(kvspn_model* model) const { kvspn_model_close(model); }
    };
    std::unique_ptr<kvspn_model, Close> model_;
    kvspn_statistics statistics_{};
};

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "kvspn's C++ engine; it takes NumPy's arrays and DLPack's tensors. See csrc/include/kvspn.h.";
    m.def("instruction_set", [] { return std::string(kvspn_instruction_set()); });
    m.def("default_threads", &kvspn_default_threads);
    m.attr("ABI_VERSION") = kvspn_abi_version();
    // Of each kind of engine that is built: where its tensors must be.
    py::dict devices;
    devices["cpu"] = "cpu";
    if (kvspn_has_device(KVSPN_DEVICE_CUDA)) devices["cuda"] = kCuda == kCpu ? "cpu" : "cuda";
    m.attr("DEVICES") = devices;
    py::class_<Engine>(m, "Engine")
        .def(py::init<const py::dict&, int, int, int, int, bool, int, int, int, bool, float, bool, float,
                      bool, const std::string&, const std::optional<std::string>&>(),
             py::arg("weights"), py::kw_only(), py::arg("layers"), py::arg("heads"), py::arg("blocks"),
             py::arg("groups"), py::arg("last_layer_only"), py::arg("threads"), py::arg("encoder_stride") = 1,
             py::arg("key_heads") = 0, py::arg("rms_norm") = false, py::arg("norm_eps") = 0.0f,
             py::arg("gated") = false, py::arg("rotary_base") = 0.0f, py::arg("cross") = true,
             py::arg("device") = "cpu", py::arg("variant") = py::none())
        .def("set_stream", &Engine::set_stream, py::arg("stream"))
        .def("bind", &Engine::bind, py::kw_only(), py::arg("kv"), py::arg("lengths"), py::arg("tokens"),
             py::arg("finished"), py::arg("stats"), py::arg("cross_kv"), py::arg("cross_lengths"),
             py::arg("kv_scale") = py::none(), py::arg("cross_kv_scale") = py::none(),
             py::arg("cross_queries") = py::none())
        .def("encode", &Engine::encode, py::arg("row"), py::arg("states"))
        .def("prefill", &Engine::prefill, py::arg("row"), py::arg("count"), py::arg("first") = 0,
             py::arg("position") = 0, py::arg("logits") = py::none())
        .def("set_rule", &Engine::set_rule, py::arg("row"), py::kw_only(), py::arg("temperature"),
             py::arg("seed"), py::arg("timestamp_begin"), py::arg("text_end"), py::arg("max_initial"),
             py::arg("prefix"), py::arg("top_k"))
        .def("choose", &Engine::choose, py::kw_only(), py::arg("mask") = py::none(),
             py::arg("first_mask") = py::none(), py::arg("log_probs") = py::none())
        .def("step", &Engine::step, py::kw_only(), py::arg("k"), py::arg("eos"), py::arg("max_length"),
             py::arg("draft"))
        .def("verify", &Engine::verify, py::arg("draft_tokens"), py::kw_only(), py::arg("k"), py::arg("eos"),
             py::arg("max_length"))
        .def("run", &Engine::run, py::kw_only(), py::arg("k"), py::arg("eos"), py::arg("max_length"),
             py::arg("draft"), py::arg("steps"))
        .def("profile", &Engine::profile, py::kw_only(), py::arg("k"), py::arg("eos"), py::arg("max_length"),
             py::arg("draft"))
        .def("plan", &Engine::plan, py::kw_only(), py::arg("max_length"), py::arg("draft"))
        .def("progress", &Engine::progress, py::arg("row"));
    py::class_<Encoder>(m, "Encoder")
        .def(py::init<const py::dict&, int, int, const std::string&, int, bool,
                      const std::optional<std::string>&>(),
             py::arg("weights"), py::kw_only(), py::arg("layers"), py::arg("heads"), py::arg("format"),
             py::arg("threads"), py::arg("output_positions") = false, py::arg("variant") = py::none())
        .def("log_mel", &Encoder::log_mel, py::arg("samples"), py::arg("features"))
        .def("encode", &Encoder::encode, py::arg("features"), py::arg("states"))
        .def_property_readonly("instruction_set", &Encoder::instruction_set);
    py::class_<Segment>(m, "Segment")
        .def_readonly("start", &Segment::start)
        .def_readonly("end", &Segment::end)
        .def_readonly("text", &Segment::text)
        .def_readonly("tokens", &Segment::tokens)
        .def_readonly("avg_logprob", &Segment::avg_logprob)
        .def_readonly("no_speech_prob", &Segment::no_speech_prob)
        .def_readonly("language", &Segment::language)
        .def_readonly("language_probability", &Segment::language_probability)
        .def_readonly("cut", &Segment::cut);
    py::class_<Model>(m, "Model")
        .def(py::init<const std::string&, int, const std::optional<std::string>&>(), py::arg("path"),
             py::kw_only(), py::arg("threads") = 0, py::arg("variant") = py::none())
        .def("transcribe", &Model::transcribe, py::arg("samples"), py::kw_only(),
             py::arg("language") = py::none(), py::arg("target") = py::none(),
             py::arg("without_timestamps") = false)
        .def_property_readonly("statistics", &Model::statistics);
}
