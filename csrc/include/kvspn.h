/* kvspn: the decoder step of a Whisper-like model with a KVSPN draft network, as one call.
 *
 * The caller owns every tensor of a batch (cache, tokens, lengths, ...) and keeps it alive while it is bound;
 * the engine owns packed weights, scratch memory and threads. Every function returns a status; where it is
 * not KVSPN_OK, kvspn_last_error() tells the calling thread which argument is wrong, what it is and what it
 * must be, and nothing has changed. An engine serves one call at a time, and answers KVSPN_BUSY to others;
 * several engines are independent. After a fork the child has engines of its own, which go on where they are;
 * one that was in a call then stays busy there.
 */
#ifndef KVSPN_H
#define KVSPN_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define KVSPN_API __declspec(dllexport)
#else
#define KVSPN_API __attribute__((visibility("default")))
#endif

#define KVSPN_ABI_VERSION 2
#define KVSPN_MAX_DIMS 6
#define KVSPN_K_INF INT32_MAX

typedef enum kvspn_status {
    KVSPN_OK = 0,
    KVSPN_INVALID_ARGUMENT = 1,
    KVSPN_OUT_OF_MEMORY = 2,
    KVSPN_INTERNAL = 3,
    KVSPN_BUSY = 4,    /* the engine is in another call, of another thread as a rule */
    KVSPN_NO_TOKEN = 5 /* NaN among a row's logits, or none above -inf: see kvspn_engine_step */
} kvspn_status;

typedef enum kvspn_dtype {
    KVSPN_FP32 = 0,
    KVSPN_BF16 = 1,
    KVSPN_FP16 = 2,
    KVSPN_INT8 = 3,
    KVSPN_INT32 = 4,
    KVSPN_BOOL = 5,
    KVSPN_INT4 = 6, /* two to a byte, the first in its low half, each the value plus 8; shape counts bytes */
    KVSPN_FP8 = 7   /* e4m3: a sign, 4 bits of exponent, 3 of mantissa; no infinity, NaN is 0x7f and 0xff */
} kvspn_dtype;

/* Where an engine or an op works. A library may be built without CUDA: see kvspn_has_device. */
typedef enum kvspn_device { KVSPN_DEVICE_CPU = 0, KVSPN_DEVICE_CUDA = 1 } kvspn_device;

/* A tensor in the caller's memory; strides count elements. */
typedef struct kvspn_tensor {
    const char* name;
    void* data;
    int32_t dtype;
    int32_t ndim;
    int64_t shape[KVSPN_MAX_DIMS];
    int64_t strides[KVSPN_MAX_DIMS];
} kvspn_tensor;

/* `struct_size` is sizeof of the struct the caller was compiled with. Later versions only append fields: what
 * a shorter struct lacks is 0, and a longer one is taken where what this version does not know is 0. */
typedef struct kvspn_engine_params {
    uint32_t struct_size;
    int32_t layers;
    int32_t heads;
    int32_t blocks; /* of the draft network; 0: none */
    int32_t groups; /* of layers; divides layers and blocks */
    int32_t last_layer_only;
    int32_t threads;        /* the caller's among them; 0: kvspn_default_threads() */
    int32_t encoder_stride; /* the draft network attends to every n-th encoder position; 0: to all */
    int32_t device;         /* a kvspn_device */
    /* How it works there; NULL: the best way. On the CPU an instruction set: "avx512vnni", "avx512", "avx2"
     * or "portable". On a CUDA device how steps run: "persistent" (one launch, for all the steps of generate
     * too), "graph" or "kernels". The environment's KVSPN_CPU and KVSPN_CUDA_STEP override it. */
    const char* variant;
    /* What the decoder is made of, if not of what Whisper's is; where none is given it is Whisper's. Of a
     * CUDA device they must be 0. */
    int32_t key_heads; /* KVH of keys and values, each for H / KVH heads of queries; 0: as many as heads */
    int32_t rms_norm;  /* 1: RMSNorm, whose norms have no bias, in place of LayerNorm */
    float norm_eps;    /* 0: 1e-5 */
    int32_t gated;     /* 1: SwiGLU in place of GELU: the first half of fc1's rows is the gate's */
    float rotary_base; /* of RoPE, in place of embed_positions: 10000, ...; 0: none */
    int32_t no_cross;  /* 1: no cross-attention, no encoder: E is 0 */
} kvspn_engine_params;

/* Everything that a batch is, each with the letters of its shape. kv and cross_kv: one dtype, FP32, BF16,
 * FP16 or INT8; all contiguous. Row b holds lengths[b] + 1 tokens; the newest is not in the cache yet. */
typedef struct kvspn_batch {
    uint32_t struct_size;
    kvspn_tensor kv;            /* [L, 2, B, H, S, D]; H: key_heads */
    kvspn_tensor lengths;       /* int32 [B] */
    kvspn_tensor tokens;        /* int32 [B, N] */
    kvspn_tensor finished;      /* bool [B] */
    kvspn_tensor stats;         /* int32 [B, 3]: steps, drafted, accepted */
    kvspn_tensor cross_kv;      /* [L, 2, B, H, E, D] */
    kvspn_tensor cross_lengths; /* int32 [B] */
    /* FP32 [L, 2, B, H, S] and [L, 2, B, H, E], what the D values of a position are times; or NULL, but
     * where the caches are INT8. */
    const kvspn_tensor *kv_scale, *cross_kv_scale;
    /* FP32 [L, B, S or more, H * D]: where a step and a prefill leave the queries of cross-attention of each
     * token they process, at its position; with the keys of cross_kv they say what a token listens to. Or
     * NULL. */
    const kvspn_tensor* cross_queries;
} kvspn_batch;

typedef struct kvspn_step_params {
    uint32_t struct_size;
    const float* mask; /* [V], added to the logits; or NULL */
    int32_t k;         /* a draft stands if among the k best; 1 is greedy, KVSPN_K_INF accepts all */
    int32_t eos;       /* -1: none */
    int32_t max_length;
    int32_t draft; /* 1: the draft network guesses a token; 0: it does not */
    /* int32 [B, 0 to 15], with draft 0: guesses of what follows each row's newest token, up to its first that
     * is no token, all verified in one pass; on a CUDA device with unit strides in a row, and there until
     * the step has run. For one step alone. Or NULL. */
    const kvspn_tensor* draft_tokens;
    /* [V], in place of mask for the first token behind what was prefilled; or NULL. */
    const float* first_mask;
    /* FP32 [B, N], contiguous: beside each token that the step adds to `tokens` goes the logarithm of its
     * probability under the masked logits, at temperature 1. Or NULL. */
    const kvspn_tensor* log_probs;
} kvspn_step_params;

/* How the tokens of one row are chosen. At a temperature they are sampled: each logit is divided by it and
 * gets noise that depends on the seed, the token and its place in the row alone, and the largest is chosen
 * (Gumbel's trick). The draft network's logits get the same noise, so that sampling with drafts gives, at
 * k = 1, bit for bit what it gives without. */
typedef struct kvspn_rule {
    uint32_t struct_size;
    float temperature; /* 0: greedy */
    uint64_t seed;
    /* The grammar of Whisper's timestamps: the token of 0.00 s, from which on all are timestamps; 0: none. A
     * row begins with one, at most this plus max_initial (-1: any); they stand in pairs and never decrease;
     * and where all together are likelier than every token of text, the token is one of them. */
    int32_t timestamp_begin;
    int32_t text_end; /* the end-of-text token; what is below is text */
    int32_t max_initial;
    int32_t
        prefix; /* so many tokens at the prompt's end are the text's own, its first timestamp among them */
    /* With a temperature: a draw is among so many of the largest masked logits, and those equal to the least
     * of them; 0: among all. */
    int32_t top_k;
} kvspn_rule;

typedef struct kvspn_generate_params {
    uint32_t struct_size;
    kvspn_step_params step;  /* every step's */
    const float* first_mask; /* that of the step, where this is not NULL */
    int32_t max_steps;       /* 0: until every row is finished */
    /* After each step, when the engine may be called; other than 0 stops there. Or NULL. */
    int32_t (*on_step)(void* context);
    void* context;
} kvspn_generate_params;

typedef struct kvspn_statistics {
    uint32_t struct_size;
    int64_t tokens; /* generated: past the prefilled ones and the one after them */
    int64_t steps;
    int64_t drafted;
    int64_t accepted;
} kvspn_statistics;

/* A part of a step: what runs between two barriers of the CPU's threads. */
typedef struct kvspn_stage {
    const char* name; /* "self_qkv", ..., "draft.fc1", ...; it lives as long as the library */
    int64_t nanoseconds;
    int64_t bytes; /* of weights, keys and values that it must read */
} kvspn_stage;

typedef struct kvspn_engine kvspn_engine;

KVSPN_API int32_t kvspn_abi_version(void);
KVSPN_API const char* kvspn_last_error(void);

/* Cores that the process may keep busy: by its affinity, and by the CPU quota of its control groups. More
 * threads than these only wait for one another. */
KVSPN_API int32_t kvspn_default_threads(void);

/* 1 if the library is built for a kvspn_device, else 0. */
KVSPN_API int32_t kvspn_has_device(int32_t device);

/* The instruction set that an engine on the CPU takes by itself. */
KVSPN_API const char* kvspn_instruction_set(void);

/* An engine on a CUDA device differs in this: the tensors of a batch, the encoder states and the masks are in
 * the device's memory, the weights in the host's, int4 in groups of 8, 16, 32, ...; work is put on the stream
 * that kvspn_engine_set_stream names, the default stream until then, step and generate without on_step do not
 * wait for it, and an error of the device may come out of a later call; a row whose length is out of bounds
 * is left alone; a child of the process, after a fork, cannot use it. */

/* Packs the weights, which may be freed afterwards. Names and shapes are those of kvspn/weights/decoder.py:
 * "embed_tokens", "layers.0.self_qkv.weight", "blocks.2.fc1.scale", ... A matrix is FP32, BF16, FP16,
 * INT8 or FP8 with a "scale" [N], or INT4, [N, K / 2], with a "scale" [N, groups]. Other names are
 * ignored. */
KVSPN_API kvspn_status kvspn_engine_create(const kvspn_engine_params* params, const kvspn_tensor* weights,
                                           int32_t count, kvspn_engine** engine);
/* Not while another call is using it. */
KVSPN_API void kvspn_engine_destroy(kvspn_engine* engine);

/* Where the calls below put their work: a cudaStream_t, which the caller keeps; NULL: the default stream.
 * What is put on different streams is the caller's to order, and engines on different ones are independent.
 * The CPU has none but NULL. */
KVSPN_API kvspn_status kvspn_engine_set_stream(kvspn_engine* engine, void* stream);

/* Takes the batch that the calls below work on, in place of the last one. On the CPU it asks the system to
 * keep the batch's caches in huge pages: a hint, best given before they are first written. */
KVSPN_API kvspn_status kvspn_engine_bind(kvspn_engine* engine, const kvspn_batch* batch);

/* Encoder states [E, d] of one row -> its cross-attention keys and values, and cross_lengths[row] = E. With
 * an encoder_stride of n they lie in the order 0, n, 2n, ..., 1, n + 1, ...: what the draft network reads
 * first. */
KVSPN_API kvspn_status kvspn_engine_encode(kvspn_engine* engine, int32_t row, const kvspn_tensor* states);

/* Processes the first `count` tokens of one row into the cache: lengths[row] = count. */
KVSPN_API kvspn_status kvspn_engine_prefill(kvspn_engine* engine, int32_t row, int32_t count);

/* The same behind the first `first` tokens, which the cache holds already: first is at most lengths[row] and
 * count. logits: FP32 [V], contiguous, which gets those of what follows the token at `position`, first to
 * count - 1, unmasked; NULL: they are not computed. */
KVSPN_API kvspn_status kvspn_engine_prefill_from(kvspn_engine* engine, int32_t row, int32_t first,
                                                 int32_t count, int32_t position, const kvspn_tensor* logits);

/* The rule of one row of the batch that is bound, from its next step on; until then a row is greedy. */
KVSPN_API kvspn_status kvspn_engine_set_rule(kvspn_engine* engine, int32_t row, const kvspn_rule* rule);

/* Draft, verify, accept, roll back: one step of every unfinished row. Allocates nothing.
 *
 * Where a row's logits give no token, its newest token is -1 and it is finished; the other rows have moved
 * on. That is KVSPN_NO_TOKEN, from step and generate, or from a CUDA device: from the next call that waits
 * for it. */
KVSPN_API kvspn_status kvspn_engine_step(kvspn_engine* engine, const kvspn_step_params* params);

/* The stages of such a step, in their order, with the bytes that each must read for the batch as it is now;
 * nothing runs. *count: how many there are; of them `capacity` are filled in at most. */
KVSPN_API kvspn_status kvspn_engine_plan(kvspn_engine* engine, const kvspn_step_params* params,
                                         kvspn_stage* stages, int32_t capacity, int32_t* count);

/* A step like that of kvspn_engine_step, each of its stages timed, in their order. *count: how many there
 * are; of them `capacity` are filled in at most. On a CUDA device the variant must be "persistent"; each
 * stage is followed by its "barrier" there, and the times are those of the grid's first block. */
KVSPN_API kvspn_status kvspn_engine_profile(kvspn_engine* engine, const kvspn_step_params* params,
                                            kvspn_stage* stages, int32_t capacity, int32_t* count);

/* Step after step, until every row is finished, max_steps are made or on_step stops it. */
KVSPN_API kvspn_status kvspn_engine_generate(kvspn_engine* engine, const kvspn_generate_params* params);

/* Takes one row back to its first length + 1 tokens, from which it goes on: lengths[row] = length, at most
 * what it is, and the row is unfinished. Statistics stay. */
KVSPN_API kvspn_status kvspn_engine_rollback(kvspn_engine* engine, int32_t row, int32_t length);

/* Forgets the utterances: lengths, cross_lengths and stats are 0, every row is finished. A new one is encode,
 * its tokens, finished[row] = 0, prefill. */
KVSPN_API kvspn_status kvspn_engine_reset(kvspn_engine* engine);

/* Fills in the figures of one row, or the sum of all for row -1; struct_size is the caller's. */
KVSPN_API kvspn_status kvspn_engine_read_statistics(kvspn_engine* engine, int32_t row,
                                                    kvspn_statistics* statistics);

/* The tokens generated for one row, as far as they are there: from a CUDA device also while it runs. *count:
 * their number; of them `capacity` are copied at most. */
KVSPN_API kvspn_status kvspn_engine_progress(kvspn_engine* engine, int32_t row, int32_t* tokens,
                                             int32_t capacity, int32_t* count);

/* The speech encoder of a Whisper, on the CPU: log-mel features -> states, which kvspn_engine_encode takes.
 */
typedef struct kvspn_encoder_params {
    uint32_t struct_size;
    int32_t layers;
    int32_t heads;
    /* How matrices are stored and multiplied: KVSPN_FP32; KVSPN_BF16, sums in FP32; or KVSPN_INT8, those of
     * the feed-forward networks, with a scale for each output, activations rounded to int8 with a scale for
     * each row, sums in int32, and all else in BF16. */
    int32_t format;
    int32_t threads;          /* the caller's among them; 0: kvspn_default_threads() */
    int32_t output_positions; /* 1: the positions' embeddings are added to the states, too */
    /* An instruction set, as of an engine, or "amx" or "avx512bf16"; NULL: the fastest of this machine. */
    const char* variant;
} kvspn_encoder_params;

typedef struct kvspn_encoder kvspn_encoder;

/* Packs the weights, FP32, BF16 or FP16, which may be freed afterwards. Names and shapes are those of
 * encoder_weights in kvspn/models/weights.py: "encoder.conv1.weight" [d, mel bands, 3],
 * "encoder.embed_positions" [positions, d], "encoder.layers.0.self_qkv.weight" [3 d, d], ... Other names are
 * ignored. */
KVSPN_API kvspn_status kvspn_encoder_create(const kvspn_encoder_params* params, const kvspn_tensor* weights,
                                            int32_t count, kvspn_encoder** encoder);
/* Not while another call is using it. */
KVSPN_API void kvspn_encoder_destroy(kvspn_encoder* encoder);

/* samples FP32 [N], finite, mono at 16 kHz -> features FP32 [mel bands, (N + 159) / 160], as Whisper has
 * them: Hann windows of 25 ms, 10 ms apart, Slaney's mel filters, decimal logarithms, of which none is more
 * than 8 below the largest, (x + 4) / 4. Whisper pads the features of a window with zeros to twice as many
 * frames as there are positions. The features do not depend on the number of threads. */
KVSPN_API kvspn_status kvspn_encoder_log_mel(kvspn_encoder* encoder, const kvspn_tensor* samples,
                                             const kvspn_tensor* features);

/* features FP32 [mel bands, T], finite, of at most twice as many frames as there are positions -> states FP32
 * [(T + 1) / 2, d], rows of any stride. The states do not depend on the number of threads. Like an engine, an
 * encoder serves one call at a time. */
KVSPN_API kvspn_status kvspn_encoder_encode(kvspn_encoder* encoder, const kvspn_tensor* features,
                                            const kvspn_tensor* states);

/* What it works with; "" where encoder is NULL. */
KVSPN_API const char* kvspn_encoder_instruction_set(const kvspn_encoder* encoder);

/* Sound to text, on the CPU, of any Whisper and of a whisperM2M: one file, which `kvspn quantize` writes,
 * holds encoder, decoder, draft network, vocabulary and what a prompt is made of. */
typedef struct kvspn_model kvspn_model;

typedef struct kvspn_model_params {
    uint32_t struct_size;
    int32_t threads;     /* the caller's among them; 0: kvspn_default_threads() */
    const char* variant; /* an instruction set, as of an encoder; NULL: the fastest of this machine */
} kvspn_model_params;

/* A stretch of speech with its text, there for as long as on_segment runs. */
typedef struct kvspn_segment {
    uint32_t struct_size; /* the library's */
    int32_t cut;          /* 1: the text reached the model's limit of tokens, and what follows is missing */
    double start, end;    /* seconds */
    const char* text; /* UTF-8, as a rule with a space in front; U+FFFD where the model made no character */
    const int32_t* tokens; /* of the text and its timestamps */
    int32_t token_count;
    float avg_logprob;    /* mean logarithm of its window's tokens' probabilities, the end's among them */
    float no_speech_prob; /* of its window */
    const char* language; /* the code of what is spoken */
    float language_probability; /* 1 where it was given */
} kvspn_segment;

typedef struct kvspn_transcribe_params {
    uint32_t struct_size;
    int32_t without_timestamps; /* 1: a window is one segment, as where the model has no timestamps */
    const char* language;       /* the code of what is spoken; NULL: the likeliest in the first window */
    const char* target; /* the code of what to translate to, "en" for a Whisper; NULL: what is spoken */
    /* Each segment as soon as its window is decoded; other than 0 stops there. */
    int32_t (*on_segment)(void* context, const kvspn_segment* segment);
    void* context;
    kvspn_statistics* statistics; /* of all windows so far, at each segment and in the end; or NULL */
} kvspn_transcribe_params;

/* params: or NULL. A file that is damaged, or of another kind, is KVSPN_INVALID_ARGUMENT; one that is changed
 * while it is opened is not noticed. */
KVSPN_API kvspn_status kvspn_model_open(const char* path, const kvspn_model_params* params,
                                        kvspn_model** model);
/* Not while another call is using it. */
KVSPN_API void kvspn_model_close(kvspn_model* model);

/* samples [count], mono at 16 kHz, any length, all finite. Greedy, window after window, as kvspn.WhisperModel
 * does it with temperature=0 and condition_on_previous_text=False: with timestamps the next window begins
 * where the last whole segment ends, without them where the window does; a window is left out where "no
 * speech" is likelier than 0.6 and the mean log-probability of its text is at most -1. A model serves one
 * call at a time. */
KVSPN_API kvspn_status kvspn_transcribe(kvspn_model* model, const float* samples, int64_t count,
                                        const kvspn_transcribe_params* params);

/* The ops of kvspn/ops, each with the contract of its namesake there. Any strides will do, but the last
 * dimension is contiguous. */

/* Where an op works.
 *
 * On a CUDA device it puts its work on a stream, waits for nothing, and works on the present device, whose
 * memory holds the tensors. On the CPU it works on the calling thread, and on those that the caller has. */
typedef struct kvspn_stream {
    void* handle; /* CUDA: a cudaStream_t; NULL: the default stream */
    /* CUDA: memory of the device for as long as the work runs, to 16 bytes; NULL: there is none. */
    void* (*allocate)(void* context, int64_t bytes);
    void* context; /* handed to the functions here */
    /* CPU: calls work(argument, part) for the parts 0 to parts - 1, at once or one by one, and returns when
     * all are done. parts: at most `threads`. NULL: the calling thread does everything. */
    void (*run)(void* context, int32_t parts, void (*work)(void* argument, int32_t part), void* argument);
    int32_t threads;
} kvspn_stream;

/* Queries over the keys of several layers as one sequence. One dtype: FP32, BF16 or FP16; kv may be INT8. */
typedef struct kvspn_attention_params {
    uint32_t struct_size;
    kvspn_tensor q;                   /* [B, Hq, Q, D] */
    kvspn_tensor kv;                  /* [n, 2, B, H, S, D] */
    kvspn_tensor lengths;             /* int32 [B], kept in 0 to S */
    kvspn_tensor out;                 /* [B, Q, Hq * D] */
    const kvspn_tensor* tail;         /* [2, B, H, S', D], or NULL */
    const kvspn_tensor* tail_lengths; /* int32 [B], or NULL */
    float scale;                      /* of the scores; usually D ** -0.5 */
    int32_t causal;                   /* query i sees lengths[b] + i + 1 positions instead of lengths[b] */
    const kvspn_tensor* kv_scale;     /* FP32 [n, 2, B, H, S] of an INT8 kv, which has no tail; or NULL */
    const kvspn_stream* stream;       /* or NULL, as in every op */
    int32_t device;                   /* a kvspn_device */
} kvspn_attention_params;

KVSPN_API kvspn_status kvspn_flat_kv_attention(const kvspn_attention_params* params);

/* [LayerNorm ->] x W^T + bias [-> GELU] [-> + residual]. x, bias and the norm: FP32, BF16 or FP16. The weight
 * also INT8 or FP8 with a scale [N], or INT4, [N, K / 2], with a scale [N, groups]. An optional tensor that
 * is all zeros is not there. */
typedef struct kvspn_linear_params {
    uint32_t struct_size;
    kvspn_tensor x;                      /* [R, K] */
    kvspn_tensor weight;                 /* [N, K] */
    kvspn_tensor out;                    /* [R, N] in x's dtype */
    kvspn_tensor scale;                  /* FP32; INT8, FP8 and INT4 alone */
    kvspn_tensor bias;                   /* [N]; optional */
    kvspn_tensor norm_weight, norm_bias; /* [K]; optional, the bias with the weight alone */
    kvspn_tensor residual;               /* [R, N] in x's dtype; optional */
    float eps;
    int32_t gelu;
    const kvspn_stream* stream;
    int32_t device; /* a kvspn_device */
} kvspn_linear_params;

KVSPN_API kvspn_status kvspn_fused_linear(const kvspn_linear_params* params);

/* The argmax of each row's logits and the rank of each draft; formats are those of kvspn_linear_params. */
typedef struct kvspn_verify_params {
    uint32_t struct_size;
    kvspn_tensor x;                      /* [B, Q, K] */
    kvspn_tensor weight;                 /* [V, K] */
    kvspn_tensor draft;                  /* int32 [B, Q - 1] */
    kvspn_tensor argmax;                 /* int32 [B, Q] */
    kvspn_tensor rank;                   /* int32 [B, Q - 1] */
    kvspn_tensor mask;                   /* FP32 [V]; optional */
    kvspn_tensor scale;                  /* FP32; INT8, FP8 and INT4 alone */
    kvspn_tensor norm_weight, norm_bias; /* [K]; optional, the bias with the weight alone */
    float eps;
    const kvspn_stream* stream;
    int32_t device; /* a kvspn_device */
    /* int32 [V], with one query a row: the tokens that the rows of weight stand for, in place of 0, 1, ...;
     * mask is then of all tokens, and argmax names one of these. Optional. */
    kvspn_tensor ids;
    kvspn_tensor first_mask; /* as mask, in its place where a choice is a row's first; optional, with rules */
    /* int32 [B, 9]: of each row the index of the first token that is chosen, the bits of the temperature, the
     * seed's low and high half; then of timestamps (see kvspn_rule) the first, or 0 for none, text_end, the
     * last that a row may begin with, and prefix; and top_k, 0 where there are eight. With lengths int32 [B],
     * query i chooses token lengths[b] + i + 1, and tokens int32 [B, N], the rows so far. Optional. */
    kvspn_tensor rules, lengths;
    /* FP32 [B, Q, 3]: the log-sum-exp of each row's masked logits, and those of its choice and of its draft.
     * Optional. */
    kvspn_tensor scores;
    kvspn_tensor tokens;
    /* int32 and FP32 [B, Q, 1 to 64]: each row's tokens with the largest masked logits, and these; the
     * largest first, of equals the smaller token; -1 and -infinity where there are fewer. Optional, both or
     * none. */
    kvspn_tensor best_tokens, best_logits;
} kvspn_verify_params;

KVSPN_API kvspn_status kvspn_lm_head_verify(const kvspn_verify_params* params);

/* Keys and values of new positions of one layer, to lengths[b] ... of row b. One dtype: FP32, BF16 or FP16;
 * k and v may be any of them where kv is INT8. */
typedef struct kvspn_append_params {
    uint32_t struct_size;
    kvspn_tensor kv;       /* [L, 2, B, H, S, D] */
    kvspn_tensor k, v;     /* [B, H, Q, D] */
    kvspn_tensor lengths;  /* int32 [B] */
    kvspn_tensor finished; /* bool [B]; optional */
    int32_t layer;
    const kvspn_stream* stream;
    kvspn_tensor kv_scale; /* FP32 [L, 2, B, H, S] of an INT8 kv; optional */
    int32_t device;        /* a kvspn_device */
} kvspn_append_params;

KVSPN_API kvspn_status kvspn_append_kv(const kvspn_append_params* params);

/* The longest accepted prefix of each row's draft, the next token, stops, statistics and the rollback. */
typedef struct kvspn_accept_params {
    uint32_t struct_size;
    kvspn_tensor tokens;      /* int32 [B, N] */
    kvspn_tensor lengths;     /* int32 [B] */
    kvspn_tensor finished;    /* bool [B] */
    kvspn_tensor stats;       /* int32 [B, 3] */
    kvspn_tensor draft, rank; /* int32 [B, Q - 1] */
    kvspn_tensor argmax;      /* int32 [B, Q] */
    int32_t k, eos, max_length;
    const kvspn_stream* stream;
    int32_t device; /* a kvspn_device */
    /* FP32 [B, Q, 3], as kvspn_lm_head_verify gives them, and [B, N], which gets the logarithm of each new
     * token's probability. Optional, both or none. */
    kvspn_tensor scores, log_probs;
} kvspn_accept_params;

KVSPN_API kvspn_status kvspn_accept_and_rollback(const kvspn_accept_params* params);

/* Position start[b] + m of row b takes what position source[b, m] of row rows[b] held before the call. */
typedef struct kvspn_compact_params {
    uint32_t struct_size;
    kvspn_tensor kv;     /* [L, 2, B, H, S, D] */
    kvspn_tensor rows;   /* int32 [B] */
    kvspn_tensor source; /* int32 [B, M] */
    kvspn_tensor start;  /* int32 [B] */
    const kvspn_stream* stream;
    kvspn_tensor kv_scale; /* FP32 [L, 2, B, H, S] of an INT8 kv, moved with it; optional */
    int32_t device;        /* a kvspn_device */
} kvspn_compact_params;

KVSPN_API kvspn_status kvspn_compact_kv(const kvspn_compact_params* params);

#ifdef __cplusplus
}
#endif

#endif /* KVSPN_H */
