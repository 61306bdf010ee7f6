/* A safetensors file: the header's length in 8 bytes, a JSON header, the data. */
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "embed.h"

void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

void* allocate(size_t count, size_t size) {
    void* data = calloc(count, size);
    if (!data) fail("out of memory");
    return data;
}

/* Steps over `text` if the header goes on with it. */
static int skip(char** at, const char* text) {
    size_t length = strlen(text);
    if (strncmp(*at, text, length)) return 0;
    *at += length;
    return 1;
}

static void expect(char** at, const char* text) {
    if (!skip(at, text)) fail("the model's header must go on with %s, got %.20s", text, *at);
}

/* A string without escapes; it is ended in place. */
static char* string(char** at) {
    expect(at, "\"");
    char *text = *at, *end = strchr(text, '"');
    if (!end) fail("the model's header ends within a string");
    *end = 0;
    *at = end + 1;
    return text;
}

typedef struct format {
    const char* name;
    int32_t dtype;
    size_t size;
} format;

static const format* format_of(const char* name) {
    static const format known[] = {{"F32", KVSPN_FP32, 4}, {"BF16", KVSPN_BF16, 2},   {"F16", KVSPN_FP16, 2},
                                   {"I8", KVSPN_INT8, 1},  {"F8_E4M3", KVSPN_FP8, 1}, {"U8", KVSPN_INT4, 1},
                                   {"I32", KVSPN_INT32, 4}};
    for (size_t i = 0; i < sizeof known / sizeof *known; ++i)
        if (!strcmp(name, known[i].name)) return &known[i];
    fail("the model's tensors must not be %s", name);
}

static void read_numbers(model* m, char** at) {
    char* out = m->names;
    expect(at, "{");
    while (!skip(at, "}")) {
        char* name = string(at);
        expect(at, ":");
        char* number = string(at);
        out += sprintf(out, "%s", name) + 1;
        out += sprintf(out, "%s", number) + 1;
        skip(at, ",");
    }
}

static void read_tensor(kvspn_tensor* t, char* name, char** at, char* data, size_t size) {
    expect(at, "{\"dtype\":");
    const format* format = format_of(string(at));
    size_t bytes = format->size;
    *t = (kvspn_tensor){.name = name, .dtype = format->dtype};
    expect(at, ",\"shape\":[");
    while (!skip(at, "]")) {
        if (t->ndim == KVSPN_MAX_DIMS) fail("%s must have at most %d dimensions", name, KVSPN_MAX_DIMS);
        t->shape[t->ndim] = strtoll(*at, at, 10);
        bytes *= t->shape[t->ndim++];
        skip(at, ",");
    }
    for (int64_t i = t->ndim - 1, stride = 1; i >= 0; stride *= t->shape[i--]) t->strides[i] = stride;
    expect(at, ",\"data_offsets\":[");
    size_t first = strtoull(*at, at, 10);
    expect(at, ",");
    size_t last = strtoull(*at, at, 10);
    expect(at, "]}");
    if (first > last || last > size || last - first != bytes)
        fail("%s must be %zu bytes of the model's %zu, got %zu to %zu", name, bytes, size, first, last);
    t->data = data + first;
}

model model_open(const char* path) {
    struct stat status;
    int file = open(path, O_RDONLY);
    if (file < 0 || fstat(file, &status)) fail("%s: cannot be opened", path);
    size_t size = status.st_size;
    char* bytes = size < 8 ? MAP_FAILED : mmap(NULL, size, PROT_READ, MAP_PRIVATE, file, 0);
    if (bytes == MAP_FAILED) fail("%s: cannot be mapped", path);
    close(file);
    uint64_t length;
    memcpy(&length, bytes, 8);
    if (length > size - 8) fail("%s: no safetensors file", path);
    char *header = allocate(length + 1, 1), *at = header;
    memcpy(header, bytes + 8, length);

    model m = {allocate(length / 2, sizeof(kvspn_tensor)), 0, allocate(length + 1, 1)};
    expect(&at, "{");
    while (!skip(&at, "}")) {
        char* name = string(&at);
        expect(&at, ":");
        if (strcmp(name, "__metadata__"))
            read_tensor(&m.tensors[m.count++], name, &at, bytes + 8 + length, size - 8 - length);
        else
            read_numbers(&m, &at);
        skip(&at, ",");
    }
    return m;
}

static const kvspn_tensor* find(const model* m, const char* format, va_list arguments) {
    char name[128];
    vsnprintf(name, sizeof name, format, arguments);
    for (int32_t i = 0; i < m->count; ++i)
        if (!strcmp(m->tensors[i].name, name)) return &m->tensors[i];
    fail("the model has no tensor %s", name);
}

const kvspn_tensor* model_tensor(const model* m, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const kvspn_tensor* tensor = find(m, format, arguments);
    va_end(arguments);
    return tensor;
}

const float* model_floats(const model* m, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const kvspn_tensor* tensor = find(m, format, arguments);
    va_end(arguments);
    if (tensor->dtype != KVSPN_FP32) fail("%s must be fp32", tensor->name);
    return tensor->data;
}

int model_number(const model* m, const char* name) {
    for (const char* at = m->names; *at;) {
        const char* number = at + strlen(at) + 1;
        if (!strcmp(at, name)) return atoi(number);
        at = number + strlen(number) + 1;
    }
    fail("the model has no %s", name);
}
