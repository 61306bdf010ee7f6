#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <new>

#include "common/cores.h"
#include "common/engine.h"
#include "common/error.h"
#include "common/model.h"

struct kvspn_engine {
    static constexpr const char* kName = "engine";
    kvspn::Engine made;
    std::atomic<bool> entered{false};
};

struct kvspn_encoder {
    static constexpr const char* kName = "encoder";
    std::unique_ptr<kvspn::Encoder> made;
    std::atomic<bool> entered{false};
};

struct kvspn_model {
    static constexpr const char* kName = "model";
    kvspn::Model made;
    std::atomic<bool> entered{false};
};

namespace {

thread_local std::string last_error;

struct Busy : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A call's hold on an engine or an encoder, which one call has at a time.
template <class Handle>
class Entry {
  public:
    explicit Entry(Handle* handle) : handle_(handle) {
        kvspn::require(handle, Handle::kName, " must be given, got a null pointer");
        enter();
    }
    Entry(const Entry&) = delete;
    ~Entry() {
        if (held_) leave();
    }

    void enter() {
        if (handle_->entered.exchange(true, std::memory_order_acquire))
            throw Busy(std::string(Handle::kName) + " must be free, got one that another call is using");
        held_ = true;
    }
    void leave() {
        held_ = false;
        handle_->entered.store(false, std::memory_order_release);
    }
    auto& operator*() const { return handle_->made; }
    auto* operator->() const { return &handle_->made; }

  private:
    Handle* handle_;
    bool held_ = false;
};

// Runs `body`; what it throws becomes a status and a text.
template <class Body>
kvspn_status guard(Body body) noexcept {
    try {
        try {
            body();
            last_error.clear();
            return KVSPN_OK;
        } catch (const kvspn::InvalidArgument& error) {
            last_error = error.what();
            return KVSPN_INVALID_ARGUMENT;
        } catch (const Busy& error) {
            last_error = error.what();
            return KVSPN_BUSY;
        } catch (const kvspn::NoToken& error) {
            last_error = error.what();
            return KVSPN_NO_TOKEN;
        } catch (const std::bad_alloc&) {
            last_error = "out of memory";
            return KVSPN_OUT_OF_MEMORY;
        } catch (const std::exception& error) {
            last_error = error.what();
            return KVSPN_INTERNAL;
        }
    } catch (...) {  // no memory for the text
        return KVSPN_OUT_OF_MEMORY;
    }
}

// Bytes of a struct's first edition, which no caller falls short of.
template <class Params>
constexpr size_t kFirstEdition = sizeof(Params);
template <>
constexpr size_t kFirstEdition<kvspn_engine_params> = offsetof(kvspn_engine_params, device);
template <>
constexpr size_t kFirstEdition<kvspn_step_params> = offsetof(kvspn_step_params, draft_tokens);
template <>
constexpr size_t kFirstEdition<kvspn_batch> = offsetof(kvspn_batch, cross_queries);
template <>
constexpr size_t kFirstEdition<kvspn_rule> = offsetof(kvspn_rule, timestamp_begin);
#define KVSPN_FIRST_EDITION(name, Params) \
    template <>                           \
    constexpr size_t kFirstEdition<Params> = offsetof(Params, device);
KVSPN_EACH_OP(KVSPN_FIRST_EDITION)

constexpr size_t kMostBytes = 4096;  // of a struct of any edition

// How much of a caller's struct of `size` bytes this edition knows; what it does not know must be 0.
template <class Params>
size_t known_bytes(const char* name, const void* given, size_t size) {
    kvspn::require(size >= kFirstEdition<Params> && size <= kMostBytes, name, "->struct_size must be ",
                   kFirstEdition<Params>, " to ", kMostBytes, ", got ", size);
    const char* bytes = static_cast<const char*>(given);
    for (size_t i = sizeof(Params); i < size; ++i)
        kvspn::require(!bytes[i], name, " must be 0 in what this version does not know, past ",
                       sizeof(Params), " bytes, got a setting in byte ", i);
    return std::min(size, sizeof(Params));
}

// The caller's struct as this edition has it: fields that the caller does not know are 0.
template <class Params>
Params take(const char* name, const Params* given) {
    kvspn::require(given, name, " must be given, got a null pointer");
    Params own{};
    std::memcpy(&own, given, known_bytes<Params>(name, given, given->struct_size));
    own.struct_size = sizeof own;
    return own;
}

// Its step lies in the midst of it, and may be of another size there.
kvspn_generate_params take(const char* name, const kvspn_generate_params* given) {
    kvspn::require(given, name, " must be given, got a null pointer");
    constexpr size_t at = offsetof(kvspn_generate_params, step), behind = at + sizeof(kvspn_step_params);
    kvspn_generate_params own{};
    own.step = take("params->step", &given->step);
    const ptrdiff_t grown = ptrdiff_t(given->step.struct_size) - ptrdiff_t(sizeof own.step);
    const size_t size = size_t(ptrdiff_t(given->struct_size) - grown);
    const char* rest = reinterpret_cast<const char*>(given) + grown;
    const size_t known = known_bytes<kvspn_generate_params>(name, rest, size);
    std::memcpy(reinterpret_cast<char*>(&own) + behind, rest + behind, known - behind);
    own.struct_size = sizeof own;
    return own;
}

// An op on the device that its parameters name.
template <class Params>
kvspn_status run_op(void (*kvspn::Backend::*op)(const Params&), const Params* given) noexcept {
    return guard([&] {
        const Params params = take("params", given);
        (kvspn::get_backend(params.device).*op)(params);
    });
}

// Fills in what an engine says of its stages.
kvspn_status list_stages(int (kvspn::Engine::*list)(const kvspn_step_params&, kvspn_stage*, int),
                         kvspn_engine* engine, const kvspn_step_params* params, kvspn_stage* stages,
                         int32_t capacity, int32_t* count) noexcept {
    return guard([&] {
        const kvspn_step_params own = take("params", params);
        kvspn::require(count && capacity >= 0 && (stages || !capacity),
                       "stages and count must be given, got a null pointer");
        const Entry entry(engine);
        *count = (entry.operator->()->*list)(own, stages, capacity);
    });
}

// A generation that leaves the engine to its caller's on_step, which may call it.
struct Between {
    Entry<kvspn_engine> entry;
    const kvspn_generate_params& params;

    static int32_t on_step(void* context) {
        Between& between = *static_cast<Between*>(context);
        between.entry.leave();
        const int32_t stop = between.params.on_step(between.params.context);
        between.entry.enter();
        return stop;
    }
};

}  // namespace

int32_t kvspn_abi_version(void) { return KVSPN_ABI_VERSION; }

const char* kvspn_last_error(void) { return last_error.c_str(); }

int32_t kvspn_default_threads(void) {
    int32_t threads = 1;
    guard([&] { threads = kvspn::usable_cores(); });
    return threads;
}

int32_t kvspn_has_device(int32_t device) { return kvspn::find_backend(device) ? 1 : 0; }

const char* kvspn_instruction_set(void) {
    const char* name = "";
    guard([&] { name = kvspn::cpu_backend.instruction_set(); });
    return name;
}

kvspn_status kvspn_engine_create(const kvspn_engine_params* params, const kvspn_tensor* weights,
                                 int32_t count, kvspn_engine** engine) {
    return guard([&] {
        const kvspn_engine_params own = take("params", params);
        kvspn::require(engine, "engine must be given, got a null pointer");
        *engine = new kvspn_engine{{own, weights, count}};
    });
}

void kvspn_engine_destroy(kvspn_engine* engine) { delete engine; }

kvspn_status kvspn_engine_set_stream(kvspn_engine* engine, void* stream) {
    return guard([&] { Entry(engine)->set_stream(stream); });
}

kvspn_status kvspn_engine_bind(kvspn_engine* engine, const kvspn_batch* batch) {
    return guard([&] {
        const kvspn_batch own = take("batch", batch);
        Entry(engine)->bind(own);
    });
}

kvspn_status kvspn_engine_encode(kvspn_engine* engine, int32_t row, const kvspn_tensor* states) {
    return guard([&] {
        kvspn::require(states, "states must be given, got a null pointer");
        Entry(engine)->encode(row, *states);
    });
}

kvspn_status kvspn_engine_prefill(kvspn_engine* engine, int32_t row, int32_t count) {
    return guard([&] { Entry(engine)->prefill(row, 0, count, 0, nullptr); });
}

kvspn_status kvspn_engine_prefill_from(kvspn_engine* engine, int32_t row, int32_t first, int32_t count,
                                       int32_t position, const kvspn_tensor* logits) {
    return guard([&] { Entry(engine)->prefill(row, first, count, position, logits); });
}

kvspn_status kvspn_engine_set_rule(kvspn_engine* engine, int32_t row, const kvspn_rule* rule) {
    return guard([&] {
        const kvspn_rule own = take("rule", rule);
        Entry(engine)->set_rule(row, own);
    });
}

kvspn_status kvspn_engine_step(kvspn_engine* engine, const kvspn_step_params* params) {
    return guard([&] {
        const kvspn_step_params own = take("params", params);
        Entry(engine)->step(own);
    });
}

kvspn_status kvspn_engine_plan(kvspn_engine* engine, const kvspn_step_params* params, kvspn_stage* stages,
                               int32_t capacity, int32_t* count) {
    return list_stages(&kvspn::Engine::plan, engine, params, stages, capacity, count);
}

kvspn_status kvspn_engine_profile(kvspn_engine* engine, const kvspn_step_params* params, kvspn_stage* stages,
                                  int32_t capacity, int32_t* count) {
    return list_stages(&kvspn::Engine::profile, engine, params, stages, capacity, count);
}

kvspn_status kvspn_engine_generate(kvspn_engine* engine, const kvspn_generate_params* params) {
    return guard([&] {
        const kvspn_generate_params given = take("params", params);
        Between between{Entry(engine), given};
        kvspn_generate_params own = given;
        if (given.on_step) own.on_step = &Between::on_step, own.context = &between;
        between.entry->generate(own);
    });
}

kvspn_status kvspn_engine_rollback(kvspn_engine* engine, int32_t row, int32_t length) {
    return guard([&] { Entry(engine)->rollback(row, length); });
}

kvspn_status kvspn_engine_reset(kvspn_engine* engine) {
    return guard([&] { Entry(engine)->reset(); });
}

kvspn_status kvspn_engine_read_statistics(kvspn_engine* engine, int32_t row, kvspn_statistics* statistics) {
    return guard([&] {
        kvspn_statistics own = take("statistics", statistics);
        Entry(engine)->read_statistics(row, own);
        own.struct_size = statistics->struct_size;
        std::memcpy(statistics, &own, std::min<size_t>(own.struct_size, sizeof own));
    });
}

kvspn_status kvspn_engine_progress(kvspn_engine* engine, int32_t row, int32_t* tokens, int32_t capacity,
                                   int32_t* count) {
    return guard([&] {
        kvspn::require(count && capacity >= 0 && (tokens || !capacity),
                       "tokens and count must be given, got a null pointer");
        *count = Entry(engine)->progress(row, tokens, capacity);
    });
}

kvspn_status kvspn_encoder_create(const kvspn_encoder_params* params, const kvspn_tensor* weights,
                                  int32_t count, kvspn_encoder** encoder) {
    return guard([&] {
        const kvspn_encoder_params own = take("params", params);
        kvspn::require(encoder, "encoder must be given, got a null pointer");
        *encoder = new kvspn_encoder{kvspn::cpu_backend.make_encoder(own, weights, count)};
    });
}

void kvspn_encoder_destroy(kvspn_encoder* encoder) { delete encoder; }

kvspn_status kvspn_encoder_log_mel(kvspn_encoder* encoder, const kvspn_tensor* samples,
                                   const kvspn_tensor* features) {
    return guard([&] {
        kvspn::require(samples, "samples must be given, got a null pointer");
        kvspn::require(features, "features must be given, got a null pointer");
        (*Entry(encoder))->log_mel(*samples, *features);
    });
}

kvspn_status kvspn_encoder_encode(kvspn_encoder* encoder, const kvspn_tensor* features,
                                  const kvspn_tensor* states) {
    return guard([&] {
        kvspn::require(features, "features must be given, got a null pointer");
        kvspn::require(states, "states must be given, got a null pointer");
        (*Entry(encoder))->encode(*features, *states);
    });
}

const char* kvspn_encoder_instruction_set(const kvspn_encoder* encoder) {
    return encoder ? encoder->made->instruction_set() : "";
}

kvspn_status kvspn_model_open(const char* path, const kvspn_model_params* params, kvspn_model** model) {
    return guard([&] {
        kvspn::require(path, "path must be given, got a null pointer");
        kvspn::require(model, "model must be given, got a null pointer");
        const kvspn_model_params own = params ? take("params", params) : kvspn_model_params{};
        *model = new kvspn_model{{path, own}};
    });
}

void kvspn_model_close(kvspn_model* model) { delete model; }

kvspn_status kvspn_transcribe(kvspn_model* model, const float* samples, int64_t count,
                              const kvspn_transcribe_params* params) {
    return guard([&] {
        const kvspn_transcribe_params own = take("params", params);
        kvspn::require(count >= 0, "count must be at least 0, got ", count);
        if (own.statistics) take("params->statistics", own.statistics);
        kvspn_tensor sound{};
        sound.data = const_cast<float*>(samples), sound.dtype = KVSPN_FP32;
        sound.ndim = 1, sound.shape[0] = count, sound.strides[0] = 1;
        Entry(model)->transcribe(sound, own);
    });
}

#define KVSPN_OP(name, Params) \
    kvspn_status kvspn_##name(const Params* params) { return run_op(&kvspn::Backend::name, params); }
KVSPN_EACH_OP(KVSPN_OP)
