#include "cpu/log_mel.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "common/error.h"
#include "common/tensor.h"

namespace kvspn::cpu {
namespace {

constexpr int kWindow = 400, kHop = 160, kRate = 16000;
constexpr int kPoints = kWindow / 2;      // of the complex transform that a real one of kWindow is made of
constexpr int kRadices[] = {5, 5, 4, 2};  // whose product is kPoints
constexpr int kTogether = 4;              // frames that lie side by side
constexpr int kPiece = 64;                // frames that a thread takes at once
constexpr double kPi = 3.14159265358979323846;

// Slaney's mel scale (Auditory Toolbox, 1998): linear to 1 kHz, then 27 steps for each factor of 6.4.
double hertz(double mel) {
    return mel < 15 ? mel * 200 / 3 : 1000 * std::exp((mel - 15) * std::log(6.4) / 27);
}
constexpr double kHighestMel = 45.245640471924965;  // of kRate / 2

float& at(const kvspn_tensor& features, int64_t band, int64_t frame) {
    return static_cast<float*>(features.data)[band * features.strides[0] + frame * features.strides[1]];
}

}  // namespace

// Complex numbers of kTogether transforms, before and after a stage.
struct LogMel::Frames {
    double real[2][kPoints][kTogether], imaginary[2][kPoints][kTogether];
    double power[kPoints + 1];
};

LogMel::LogMel(int bands) : window_(kWindow), cosine_(kWindow), sine_(kWindow), filters_(size_t(bands)) {
    for (int n = 0; n < kWindow; ++n) {
        cosine_[n] = std::cos(2 * kPi * n / kWindow), sine_[n] = std::sin(2 * kPi * n / kWindow);
        window_[n] = 0.5 - 0.5 * cosine_[n];
    }
    for (int band = 0; band < bands; ++band) {
        const auto edge = [&](int n) { return hertz(kHighestMel * (band + n) / (bands + 1)); };
        const double low = edge(0), top = edge(1), high = edge(2);
        Filter& filter = filters_[size_t(band)];
        for (int bin = 0; bin <= kPoints; ++bin) {
            const double frequency = double(bin) * kRate / kWindow;
            const double weight =
                std::min((frequency - low) / (top - low), (high - frequency) / (high - top));
            if (weight <= 0) continue;
            if (filter.weights.empty()) filter.first = bin;
            filter.weights.push_back(weight * 2 / (high - low));
        }
    }
}

void LogMel::run(Team& team, const kvspn_tensor& samples, const kvspn_tensor& features) const {
    check_tensor("samples", samples, {Dtype::fp32}, {kAny});
    const int64_t count = samples.shape[0], frames = (count + kHop - 1) / kHop,
                  bands = int64_t(filters_.size());
    check_tensor("features", features, {Dtype::fp32}, {bands, frames});
    for (int64_t i = 0; i < count; ++i) {
        const float value = element(samples, i * samples.strides[0]);
        require(std::isfinite(value), "samples must be finite, got ", value, " at ", i);
    }
    std::atomic<int64_t> taken{0};
    std::vector<float> highest(size_t(team.size()), -INFINITY);
    team.run([&](int thread) {
        Frames own;
        for (int64_t first; (first = taken.fetch_add(kPiece, std::memory_order_relaxed)) < frames;)
            for (int64_t frame = first; frame < std::min(first + kPiece, frames); frame += kTogether) {
                const int here = int(std::min<int64_t>(kTogether, frames - frame));
                highest[size_t(thread)] =
                    std::max(highest[size_t(thread)], spectra(own, samples, frame, here, features));
            }
        team.barrier();
        const float floor = *std::max_element(highest.begin(), highest.end()) - 8;
        for (int64_t band = thread; band < bands; band += team.size())
            for (int64_t frame = 0; frame < frames; ++frame) {
                float& value = at(features, band, frame);
                value = (std::max(value, floor) + 4) / 4;
            }
    });
}

// The logarithms of `count` frames from the `first` on; the largest of them.
float LogMel::spectra(Frames& frames, const kvspn_tensor& samples, int64_t first, int count,
                      const kvspn_tensor& features) const {
    const float* sound = static_cast<const float*>(samples.data);
    // Mirrored at both ends, of whole frames, which zeros fill up, and of half a window at least.
    const int64_t length = std::max<int64_t>(features.shape[1] * kHop, kPoints + 1);
    for (int lane = 0; lane < kTogether; ++lane) {
        const int64_t begin = (first + std::min(lane, count - 1)) * kHop - kPoints;
        for (int n = 0; n < kWindow; ++n) {
            int64_t place = std::abs(begin + n);
            if (place >= length) place = 2 * (length - 1) - place;
            const double value =
                place < samples.shape[0] ? window_[n] * sound[place * samples.strides[0]] : 0;
            double (*parts)[kTogether] = n % 2 ? frames.imaginary[0] : frames.real[0];
            parts[n / 2][lane] = value;
        }
    }
    transform(frames);
    float highest = -INFINITY;
    for (int lane = 0; lane < count; ++lane) {
        const auto &real = frames.real[0], &imaginary = frames.imaginary[0];
        for (int k = 0; k <= kPoints; ++k) {
            const int here = k % kPoints, mirrored = (kPoints - k) % kPoints;
            const double a = real[here][lane], b = imaginary[here][lane], c = real[mirrored][lane],
                         d = imaginary[mirrored][lane];
            // The transforms of even and of odd samples; the latter lags by half a step.
            const double even_real = a + c, even_imaginary = b - d, odd_real = b + d, odd_imaginary = c - a;
            const double x = even_real + cosine_[k] * odd_real + sine_[k] * odd_imaginary,
                         y = even_imaginary + cosine_[k] * odd_imaginary - sine_[k] * odd_real;
            frames.power[k] = (x * x + y * y) / 4;
        }
        for (size_t band = 0; band < filters_.size(); ++band) {
            const Filter& filter = filters_[band];
            double sum = 0;
            for (size_t i = 0; i < filter.weights.size(); ++i)
                sum += filter.weights[i] * frames.power[size_t(filter.first) + i];
            const float value = float(std::log10(std::max(sum, 1e-10)));
            at(features, int64_t(band), first + lane) = value;
            highest = std::max(highest, value);
        }
    }
    return highest;
}

// Discrete Fourier transforms of kPoints complex numbers, in place: Stockham's, whose stages put everything
// into its final order (Cochran et al., "What is the fast Fourier transform?", 1967).
void LogMel::transform(Frames& frames) const {
    static_assert(std::size(kRadices) % 2 == 0,
                  "the last stage leaves its numbers where the first took them");
    int from = 0, stride = 1;
    for (const int radix : kRadices) {
        const int parts = kPoints / stride / radix;  // of what is left to transform
        const auto &real = frames.real[from], &imaginary = frames.imaginary[from];
        for (int part = 0; part < parts; ++part)
            for (int j = 0; j < radix; ++j)
                for (int q = 0; q < stride; ++q) {
                    double x[kTogether] = {}, y[kTogether] = {};
                    for (int k = 0; k < radix; ++k) {
                        const int place = part + parts * k, angle = 2 * (stride * j * place % kPoints);
                        const double c = cosine_[angle], s = sine_[angle];
                        const double *a = real[q + stride * place], *b = imaginary[q + stride * place];
                        for (int lane = 0; lane < kTogether; ++lane) {
                            x[lane] += a[lane] * c + b[lane] * s;
                            y[lane] += b[lane] * c - a[lane] * s;
                        }
                    }
                    const int to = q + stride * (radix * part + j);
                    std::copy_n(x, kTogether, frames.real[1 - from][to]);
                    std::copy_n(y, kTogether, frames.imaginary[1 - from][to]);
                }
        from = 1 - from, stride *= radix;
    }
}

}  // namespace kvspn::cpu
