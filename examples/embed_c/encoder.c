/* Whisper's encoder: two convolutions, positions, pre-norm transformer layers. Plain loops, fp32. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "embed.h"

static float gelu(float x) { return 0.5f * x * (1 + erff(x * 0.70710678f)); }

/* x [inputs, frames] -> [outputs, frames / stride]: a kernel of 3, zeros around it, GELU. */
static float* convolve(const model* m, const char* name, const float* x, int frames, int stride) {
    const kvspn_tensor* tensor = model_tensor(m, "encoder.%s.weight", name); /* [outputs, inputs, 3] */
    const float *weight = model_floats(m, "encoder.%s.weight", name),
                *bias = model_floats(m, "encoder.%s.bias", name);
    const int outputs = (int)tensor->shape[0], inputs = (int)tensor->shape[1], count = frames / stride;
    float* y = allocate((size_t)outputs * count, sizeof(float));
    for (int o = 0; o < outputs; ++o) {
        float* row = y + (size_t)o * count;
        for (int t = 0; t < count; ++t) row[t] = bias[o];
        for (int i = 0; i < inputs; ++i) {
            const float *w = weight + ((size_t)o * inputs + i) * 3, *from = x + (size_t)i * frames;
            for (int t = 0; t < count; ++t)
                for (int j = 0; j < 3; ++j) {
                    int at = t * stride + j - 1;
                    if (at >= 0 && at < frames) row[t] += w[j] * from[at];
                }
        }
        for (int t = 0; t < count; ++t) row[t] = gelu(row[t]);
    }
    return y;
}

static void layer_norm(const model* m, const char* name, const float* x, int rows, int d, float* y) {
    const float *weight = model_floats(m, "encoder.%s.weight", name),
                *bias = model_floats(m, "encoder.%s.bias", name);
    for (int r = 0; r < rows; ++r, x += d, y += d) {
        double mean = 0, variance = 0;
        for (int n = 0; n < d; ++n) mean += x[n];
        mean /= d;
        for (int n = 0; n < d; ++n) variance += (x[n] - mean) * (x[n] - mean);
        const double scale = 1 / sqrt(variance / d + 1e-5);
        for (int n = 0; n < d; ++n) y[n] = (float)((x[n] - mean) * scale) * weight[n] + bias[n];
    }
}

/* y [rows, outputs] += x [rows, inputs] W^T + b */
static void linear(const model* m, int layer, const char* name, const float* x, int rows, float* y) {
    const kvspn_tensor* tensor = model_tensor(m, "encoder.layers.%d.%s.weight", layer, name);
    const float *weight = model_floats(m, "encoder.layers.%d.%s.weight", layer, name),
                *bias = model_floats(m, "encoder.layers.%d.%s.bias", layer, name);
    const int outputs = (int)tensor->shape[0], inputs = (int)tensor->shape[1];
    for (int r = 0; r < rows; ++r)
        for (int o = 0; o < outputs; ++o) {
            const float *a = x + (size_t)r * inputs, *b = weight + (size_t)o * inputs;
            float sums[8] = {0}; /* side by side, so that the compiler can use vectors */
            int n = 0;
            for (; n + 8 <= inputs; n += 8)
                for (int i = 0; i < 8; ++i) sums[i] += a[n + i] * b[n + i];
            float sum = bias[o];
            for (; n < inputs; ++n) sum += a[n] * b[n];
            for (int i = 0; i < 8; ++i) sum += sums[i];
            y[(size_t)r * outputs + o] += sum;
        }
}

/* qkv [rows, 3 * d] -> out [rows, d] */
static void attend(const float* qkv, int rows, int d, int heads, float* out) {
    const int width = d / heads;
    const float scale = 1 / sqrtf((float)width);
    float* scores = allocate(rows, sizeof(float));
    memset(out, 0, (size_t)rows * d * sizeof(float));
    for (int h = 0; h < heads; ++h)
        for (int r = 0; r < rows; ++r) {
            const float* q = qkv + (size_t)r * 3 * d + h * width;
            float highest = -INFINITY, total = 0;
            for (int t = 0; t < rows; ++t) {
                const float* k = qkv + (size_t)t * 3 * d + d + h * width;
                float score = 0;
                for (int n = 0; n < width; ++n) score += q[n] * k[n];
                scores[t] = score * scale;
                highest = fmaxf(highest, scores[t]);
            }
            for (int t = 0; t < rows; ++t) total += scores[t] = expf(scores[t] - highest);
            for (int t = 0; t < rows; ++t) {
                const float *v = qkv + (size_t)t * 3 * d + 2 * d + h * width, share = scores[t] / total;
                for (int n = 0; n < width; ++n) out[(size_t)r * d + h * width + n] += share * v[n];
            }
        }
    free(scores);
}

float* encode(const model* m, const float* features, int frames) {
    const kvspn_tensor* conv = model_tensor(m, "encoder.conv2.weight");
    const float* positions = model_floats(m, "encoder.embed_positions");
    const int rows = frames / 2, d = (int)conv->shape[0], heads = model_number(m, "encoder_heads");
    float *first = convolve(m, "conv1", features, frames, 1),
          *second = convolve(m, "conv2", first, frames, 2);
    float* x = allocate((size_t)rows * d, sizeof(float));
    for (int r = 0; r < rows; ++r)
        for (int n = 0; n < d; ++n) x[r * d + n] = second[n * rows + r] + positions[r * d + n];
    free(first), free(second);

    float* normed = allocate((size_t)rows * d, sizeof(float));
    for (int i = 0; i < model_number(m, "encoder_layers"); ++i) {
        char name[64];
        const int hidden = (int)model_tensor(m, "encoder.layers.%d.fc1.weight", i)->shape[0];
        float *qkv = allocate((size_t)rows * 3 * d, sizeof(float)),
              *wide = allocate((size_t)rows * hidden, sizeof(float));
        snprintf(name, sizeof name, "layers.%d.self_norm", i);
        layer_norm(m, name, x, rows, d, normed);
        linear(m, i, "self_qkv", normed, rows, qkv);
        attend(qkv, rows, d, heads, normed);
        linear(m, i, "self_out", normed, rows, x);
        snprintf(name, sizeof name, "layers.%d.ffn_norm", i);
        layer_norm(m, name, x, rows, d, normed);
        linear(m, i, "fc1", normed, rows, wide);
        for (int n = 0; n < rows * hidden; ++n) wide[n] = gelu(wide[n]);
        linear(m, i, "fc2", wide, rows, x);
        free(qkv), free(wide);
    }
    layer_norm(m, "norm", x, rows, d, normed);
    if (model_number(m, "encoder_output_positions"))
        for (int n = 0; n < rows * d; ++n) normed[n] += positions[n];
    free(x);
    return normed;
}
