/* Whisper's log-mel features of a wav file. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "embed.h"

#define RATE 16000

static uint32_t little_endian(const unsigned char* bytes, int count) {
    uint32_t value = 0;
    for (int i = count - 1; i >= 0; --i) value = value << 8 | bytes[i];
    return value;
}

float* wav_read(const char* path, int count) {
    FILE* file = fopen(path, "rb");
    unsigned char header[12], chunk[8], format[16] = {0};
    if (!file) fail("%s: cannot be opened", path);
    if (fread(header, 1, 12, file) != 12 || memcmp(header, "RIFF", 4) || memcmp(header + 8, "WAVE", 4))
        fail("%s: no wav file", path);
    for (;;) {
        if (fread(chunk, 1, 8, file) != 8) fail("%s: no samples in it", path);
        uint32_t size = little_endian(chunk + 4, 4);
        if (!memcmp(chunk, "data", 4)) {
            uint32_t kind = little_endian(format, 2), channels = little_endian(format + 2, 2),
                     rate = little_endian(format + 4, 4), bits = little_endian(format + 14, 2);
            if (kind != 1 || channels != 1 || rate != RATE || bits != 16)
                fail("%s: must be 16-bit PCM, mono at %d Hz; got format %u, %u channels, %u Hz, %u bits",
                     path, RATE, kind, channels, rate, bits);
            float* samples = allocate(count, sizeof(float));
            unsigned char pair[2];
            for (int n = 0; n < count && 2 * (uint32_t)n + 1 < size && fread(pair, 1, 2, file) == 2; ++n)
                samples[n] = (int16_t)little_endian(pair, 2) / 32768.0f;
            fclose(file);
            return samples;
        }
        long rest = size + size % 2;
        if (!memcmp(chunk, "fmt ", 4)) {
            if (size < 16 || fread(format, 1, 16, file) != 16) fail("%s: a damaged wav file", path);
            rest -= 16;
        }
        if (fseek(file, rest, SEEK_CUR)) fail("%s: a damaged wav file", path);
    }
}

float* log_mel(const model* m, const float* samples) {
    const kvspn_tensor* filters = model_tensor(m, "mel_filters"); /* [mel bins, bins] */
    const float* filter = model_floats(m, "mel_filters");
    const int count = model_number(m, "samples"), hop = model_number(m, "hop"), frames = count / hop;
    const int mels = (int)filters->shape[0], bins = (int)filters->shape[1], size = 2 * (bins - 1);
    double *cosine = allocate(size, sizeof(double)), *frame = allocate(size, sizeof(double)),
           *power = allocate(bins, sizeof(double));
    float* features = allocate((size_t)mels * frames, sizeof(float));
    float highest = -INFINITY;
    for (int n = 0; n < size; ++n) cosine[n] = cos(2 * acos(-1.0) * n / size);
    for (int f = 0; f < frames; ++f) {
        for (int n = 0; n < size; ++n) { /* centred at f * hop, mirrored at both ends, in a Hann window */
            int at = abs(f * hop + n - size / 2);
            if (at >= count) at = 2 * (count - 1) - at;
            frame[n] = samples[at] * (0.5 - 0.5 * cosine[n]);
        }
        for (int k = 0; k < bins; ++k) {
            double real = 0, imaginary = 0;
            for (int n = 0; n < size; ++n) {
                int phase = (int)((int64_t)k * n % size);
                real += frame[n] * cosine[phase];
                imaginary += frame[n] * cosine[(phase + size / 4) % size]; /* -sine */
            }
            power[k] = real * real + imaginary * imaginary;
        }
        for (int i = 0; i < mels; ++i) {
            double sum = 0;
            for (int k = 0; k < bins; ++k) sum += filter[i * bins + k] * power[k];
            float value = (float)log10(fmax(sum, 1e-10));
            features[(size_t)i * frames + f] = value;
            highest = fmaxf(highest, value);
        }
    }
    for (int i = 0; i < mels * frames; ++i) features[i] = (fmaxf(features[i], highest - 8) + 4) / 4;
    free(cosine), free(frame), free(power);
    return features;
}
