/* translate MODEL WAV SOURCE TARGET: speech to text, by libkvspn alone. MODEL is from `kvspn quantize`. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "embed.h"

static void check(kvspn_status status) {
    if (status != KVSPN_OK) fail("%s", kvspn_last_error());
}

static kvspn_tensor tensor(const char* name, void* data, int32_t dtype, int32_t ndim, const int64_t* shape) {
    kvspn_tensor t = {.name = name, .data = data, .dtype = dtype, .ndim = ndim};
    for (int64_t i = ndim - 1, stride = 1; i >= 0; stride *= shape[i--])
        t.shape[i] = shape[i], t.strides[i] = stride;
    return t;
}
#define TENSOR(name, data, dtype, ...) \
    tensor(name, data, dtype, sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t), (int64_t[]){__VA_ARGS__})

static int language(const model* m, const char* code) {
    char name[64];
    snprintf(name, sizeof name, "language.%s", code);
    return model_number(m, name);
}

/* What on_step prints: the text of the tokens that are new. */
typedef struct printer {
    const unsigned char* bytes;
    const int32_t *ends, *tokens, *length;
    int printed, text;
} printer;

static int32_t print_new(void* context) {
    printer* p = context;
    for (; p->printed <= *p->length; ++p->printed) {
        const int32_t token = p->tokens[p->printed];
        for (int32_t i = token ? p->ends[token - 1] : 0; i < p->ends[token]; ++i)
            if (p->text || p->bytes[i] != ' ') putchar(p->bytes[i]), p->text = 1;
    }
    fflush(stdout);
    return 0;
}

int main(int argc, char** argv) {
    if (argc != 5) fail("usage: translate MODEL WAV SOURCE TARGET");
    const model m = model_open(argv[1]);
    const int source = language(&m, argv[3]), target = language(&m, argv[4]);
    const int named = model_number(&m, "target_follows_task"); /* not in a Whisper's prompt */
    if (!named && target != source && target != language(&m, "en")) fail("a Whisper translates to en alone");

    float* samples = wav_read(argv[2], model_number(&m, "samples"));
    const int frames = model_number(&m, "samples") / model_number(&m, "hop"), positions = frames / 2;
    float *features = log_mel(&m, samples), *states = encode(&m, features, frames);

    kvspn_engine* engine;
    const kvspn_engine_params params = {.struct_size = sizeof params,
                                        .layers = model_number(&m, "layers"),
                                        .heads = model_number(&m, "heads"),
                                        .blocks = model_number(&m, "blocks"),
                                        .groups = model_number(&m, "groups"),
                                        .last_layer_only = model_number(&m, "last_layer_only"),
                                        .encoder_stride = model_number(&m, "encoder_stride")};
    check(kvspn_engine_create(&params, m.tensors, m.count, &engine));

    /* A batch of one. The cache has the dtype of the embeddings, as in Python. */
    const kvspn_tensor *embed = model_tensor(&m, "embed_tokens"),
                       *places = model_tensor(&m, "embed_positions");
    const int64_t layers = params.layers, heads = params.heads, capacity = places->shape[0],
                  d = embed->shape[1], width = d / heads;
    const size_t size = embed->dtype == KVSPN_FP32 ? 4 : 2;
    void *kv = allocate(layers * 2 * d * capacity, size),
         *cross_kv = allocate(layers * 2 * d * positions, size);
    int32_t *tokens = allocate(capacity, sizeof(int32_t)), length = 0, stats[3], cross_length = 0;
    uint8_t finished = 0;
    const kvspn_batch batch = {
        .struct_size = sizeof batch,
        .kv = TENSOR("kv", kv, embed->dtype, layers, 2, 1, heads, capacity, width),
        .lengths = TENSOR("lengths", &length, KVSPN_INT32, 1),
        .tokens = TENSOR("tokens", tokens, KVSPN_INT32, 1, capacity),
        .finished = TENSOR("finished", &finished, KVSPN_BOOL, 1),
        .stats = TENSOR("stats", stats, KVSPN_INT32, 1, 3),
        .cross_kv = TENSOR("cross_kv", cross_kv, embed->dtype, layers, 2, 1, heads, positions, width),
        .cross_lengths = TENSOR("cross_lengths", &cross_length, KVSPN_INT32, 1)};
    check(kvspn_engine_bind(engine, &batch));

    /* An utterance: encoder states, the prompt, all its tokens but the newest into the cache. */
    check(kvspn_engine_reset(engine));
    const kvspn_tensor given = TENSOR("states", states, KVSPN_FP32, positions, d);
    check(kvspn_engine_encode(engine, 0, &given));
    int count = 0;
    tokens[count++] = model_number(&m, "start");
    tokens[count++] = source;
    tokens[count++] = model_number(&m, source == target ? "transcribe" : "translate");
    if (named && source != target) tokens[count++] = target;
    tokens[count++] = model_number(&m, "no_timestamps");
    finished = 0;
    check(kvspn_engine_prefill(engine, 0, count - 1));

    printer out = {model_tensor(&m, "vocabulary.bytes")->data,
                   model_tensor(&m, "vocabulary.ends")->data,
                   tokens,
                   &length,
                   count,
                   0};
    const kvspn_generate_params generate = {.struct_size = sizeof generate,
                                            .step = {.struct_size = sizeof generate.step,
                                                     .mask = model_floats(&m, "mask"),
                                                     .k = 1,
                                                     .eos = model_number(&m, "eos"),
                                                     .max_length = (int32_t)capacity,
                                                     .draft = params.blocks > 0},
                                            .first_mask = model_floats(&m, "first_mask"),
                                            .on_step = print_new,
                                            .context = &out};
    check(kvspn_engine_generate(engine, &generate));
    kvspn_statistics all = {.struct_size = sizeof all};
    check(kvspn_engine_read_statistics(engine, -1, &all));
    putchar('\n');
    fflush(stdout);
    fprintf(stderr, "%d tokens in %d steps, %d of %d drafts accepted\n", (int)all.tokens, (int)all.steps,
            (int)all.accepted, (int)all.drafted);
    kvspn_engine_destroy(engine);
    free(samples), free(features), free(states), free(kv), free(cross_kv), free(tokens);
}
