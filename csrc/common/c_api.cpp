#include <atomic>
#include <new>

#include "common/cores.h"
#include "common/error.h"
#include "common/ops.h"
#if defined(KVSPN_CUDA)  // one ABI, a library for each kind of device
#include "cuda/engine.h"
#else
#include "cpu/engine.h"
#endif

struct kvspn_engine {
    kvspn::Engine engine;
    std::atomic<bool> entered{false};
};

namespace {

thread_local std::string last_error;

struct Busy : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A call's hold on an engine, which one call has at a time.
class Entry {
  public:
    explicit Entry(kvspn_engine* engine) : engine_(engine) {
        kvspn::require(engine, "engine must be given, got a null pointer");
        enter();
    }
    Entry(const Entry&) = delete;
    ~Entry() {
        if (held_) leave();
    }

    void enter() {
        if (engine_->entered.exchange(true, std::memory_order_acquire))
            throw Busy("engine must be free, got one that another call is using");
        held_ = true;
    }
    void leave() {
        held_ = false;
        engine_->entered.store(false, std::memory_order_release);
    }
    kvspn::Engine* operator->() const { return &engine_->engine; }

  private:
    kvspn_engine* engine_;
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

template <class Params>
void check_struct(const char* name, const Params* params) {
    kvspn::require(params, name, " must be given, got a null pointer");
    kvspn::require(params->struct_size == sizeof(Params), name, "->struct_size must be ", sizeof(Params),
                   ", got ", params->struct_size);
}

// A generation that leaves the engine to its caller's on_step, which may call it.
struct Between {
    Entry entry;
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

const char* kvspn_instruction_set(void) {
    const char* name = "";
    guard([&] { name = kvspn::instruction_set(); });
    return name;
}

kvspn_status kvspn_engine_create(const kvspn_engine_params* params, const kvspn_tensor* weights,
                                 int32_t count, kvspn_engine** engine) {
    return guard([&] {
        check_struct("params", params);
        kvspn::require(engine, "engine must be given, got a null pointer");
        *engine = new kvspn_engine{{*params, weights, count}};
    });
}

void kvspn_engine_destroy(kvspn_engine* engine) { delete engine; }

kvspn_status kvspn_engine_set_stream(kvspn_engine* engine, void* stream) {
    return guard([&] { Entry(engine)->set_stream(stream); });
}

kvspn_status kvspn_engine_bind(kvspn_engine* engine, const kvspn_batch* batch) {
    return guard([&] {
        check_struct("batch", batch);
        Entry(engine)->bind(*batch);
    });
}

kvspn_status kvspn_engine_encode(kvspn_engine* engine, int32_t row, const kvspn_tensor* states) {
    return guard([&] {
        kvspn::require(states, "states must be given, got a null pointer");
        Entry(engine)->encode(row, *states);
    });
}

kvspn_status kvspn_engine_prefill(kvspn_engine* engine, int32_t row, int32_t count) {
    return guard([&] { Entry(engine)->prefill(row, count); });
}

kvspn_status kvspn_engine_step(kvspn_engine* engine, const kvspn_step_params* params) {
    return guard([&] {
        check_struct("params", params);
        Entry(engine)->step(*params);
    });
}

kvspn_status kvspn_engine_profile(kvspn_engine* engine, const kvspn_step_params* params, kvspn_stage* stages,
                                  int32_t capacity, int32_t* count) {
    return guard([&] {
        check_struct("params", params);
        kvspn::require(count && capacity >= 0 && (stages || !capacity),
                       "stages and count must be given, got a null pointer");
        *count = Entry(engine)->profile(*params, stages, capacity);
    });
}

kvspn_status kvspn_engine_generate(kvspn_engine* engine, const kvspn_generate_params* params) {
    return guard([&] {
        check_struct("params", params);
        check_struct("params->step", &params->step);
        Between between{Entry(engine), *params};
        kvspn_generate_params own = *params;
        if (params->on_step) own.on_step = &Between::on_step, own.context = &between;
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
        check_struct("statistics", statistics);
        Entry(engine)->read_statistics(row, *statistics);
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

kvspn_status kvspn_flat_kv_attention(const kvspn_attention_params* params) {
    return guard([&] {
        check_struct("params", params);
        kvspn::flat_kv_attention(*params);
    });
}

kvspn_status kvspn_fused_linear(const kvspn_linear_params* params) {
    return guard([&] {
        check_struct("params", params);
        kvspn::fused_linear(*params);
    });
}

kvspn_status kvspn_lm_head_verify(const kvspn_verify_params* params) {
    return guard([&] {
        check_struct("params", params);
        kvspn::lm_head_verify(*params);
    });
}

kvspn_status kvspn_append_kv(const kvspn_append_params* params) {
    return guard([&] {
        check_struct("params", params);
        kvspn::append_kv(*params);
    });
}

kvspn_status kvspn_accept_and_rollback(const kvspn_accept_params* params) {
    return guard([&] {
        check_struct("params", params);
        kvspn::accept_and_rollback(*params);
    });
}

kvspn_status kvspn_compact_kv(const kvspn_compact_params* params) {
    return guard([&] {
        check_struct("params", params);
        kvspn::compact_kv(*params);
    });
}
