// Whisper's log-mel spectrum: sound at 16 kHz to frames of 10 ms, each a row of bands.
#pragma once

#include <vector>

#include "cpu/team.h"
#include "kvspn.h"

namespace kvspn::cpu {

class LogMel {
  public:
    explicit LogMel(int bands);

    // samples FP32 [N], finite -> features FP32 [bands, (N + 159) / 160]. No bit depends on the team's size.
    void run(Team& team, const kvspn_tensor& samples, const kvspn_tensor& features) const;

  private:
    // A triangle over frequencies, the weights of those from `first` on.
    struct Filter {
        int first = 0;
        std::vector<double> weights;
    };
    struct Frames;

    float spectra(Frames& frames, const kvspn_tensor& samples, int64_t first, int count,
                  const kvspn_tensor& features) const;
    void transform(Frames& frames) const;

    std::vector<double> window_, cosine_, sine_;  // of the 400 angles of a turn
    std::vector<Filter> filters_;
};

}  // namespace kvspn::cpu
