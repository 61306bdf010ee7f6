/* transcribe MODEL WAV [LANGUAGE [TARGET]]: speech to text, by libkvspn alone. MODEL is from `kvspn
 * quantize`. */
#include <kvspn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The samples of a wav: 16-bit PCM, mono at 16 kHz. */
static float* read_wav(const char* path, int64_t* count) {
    FILE* file = fopen(path, "rb");
    unsigned char head[12], chunk[8], format[16] = {0};
    uint32_t size = 0;
    if (!file || fread(head, 1, 12, file) != 12 || memcmp(head, "RIFF", 4) || memcmp(head + 8, "WAVE", 4))
        return NULL;
    while (fread(chunk, 1, 8, file) == 8) {
        size = chunk[4] | chunk[5] << 8 | chunk[6] << 16 | (uint32_t)chunk[7] << 24;
        if (!memcmp(chunk, "data", 4)) break;
        long rest = size + size % 2;
        if (!memcmp(chunk, "fmt ", 4) && size >= 16) rest -= fread(format, 1, 16, file);
        if (fseek(file, rest, SEEK_CUR)) return NULL;
    }
    if (memcmp(format, "\1\0\1\0\x80\x3e\0\0", 8) || format[14] != 16) return NULL;
    unsigned char* bytes = malloc(size);
    float* samples = malloc(2 * (size_t)size);
    if (!bytes || !samples) return NULL;
    *count = (int64_t)fread(bytes, 2, size / 2, file);
    for (int64_t i = 0; i < *count; ++i)
        samples[i] = (int16_t)(bytes[2 * i] | bytes[2 * i + 1] << 8) / 32768.0f;
    free(bytes), fclose(file);
    return samples;
}

static int32_t print(void* context, const kvspn_segment* segment) {
    (void)context;
    printf("%.2f-%.2f %s %s\n", segment->start, segment->end, segment->language,
           segment->text + (segment->text[0] == ' '));
    return fflush(stdout);
}

int main(int argc, char** argv) {
    kvspn_model* model;
    kvspn_statistics all = {.struct_size = sizeof all};
    kvspn_transcribe_params params = {.struct_size = sizeof params, .on_segment = print, .statistics = &all};
    if (argc < 3 || argc > 5) return fprintf(stderr, "usage: transcribe MODEL WAV [LANGUAGE [TARGET]]\n"), 2;
    if (argc > 3) params.language = argv[3];
    if (argc > 4) params.target = argv[4];
    int64_t count = 0;
    float* samples = read_wav(argv[2], &count);
    if (!samples) return fprintf(stderr, "%s: must be a wav of 16 bits, mono at 16 kHz\n", argv[2]), 1;
    if (kvspn_model_open(argv[1], NULL, &model) || kvspn_transcribe(model, samples, count, &params))
        return fprintf(stderr, "%s\n", kvspn_last_error()), 1;
    fprintf(stderr, "%d tokens in %d steps, %d of %d drafts accepted\n", (int)all.tokens, (int)all.steps,
            (int)all.accepted, (int)all.drafted);
    kvspn_model_close(model), free(samples);
}
