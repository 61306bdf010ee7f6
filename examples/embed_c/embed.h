/* The parts of the example: each ends the program with a line on stderr where something is wrong. */
#ifndef EMBED_H
#define EMBED_H

#include <kvspn.h>

_Noreturn void fail(const char* format, ...);
void* allocate(size_t count, size_t size); /* zeroed */

/* What `kvspn quantize` wrote: named tensors, mapped from the file, and named numbers. */
typedef struct model {
    kvspn_tensor* tensors;
    int32_t count;
    char* names; /* "name\0number\0name\0number\0\0" */
} model;

model model_open(const char* path);
const kvspn_tensor* model_tensor(const model* m, const char* format, ...);
const float* model_floats(const model* m, const char* format, ...);
int model_number(const model* m, const char* name);

/* A wav of 16-bit samples, mono at 16 kHz, cut or padded with zeros to `count`. */
float* wav_read(const char* path, int count);

/* Samples -> log-mel features [mel bins, samples / hop]. */
float* log_mel(const model* m, const float* samples);

/* Features [mel bins, frames] -> encoder states [frames / 2, d]. */
float* encode(const model* m, const float* features, int frames);

#endif
