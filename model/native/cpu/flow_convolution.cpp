// The 3x3 convolution that gives a flow, on the CPU: two channels out of hundreds.
//
// A library's kernels compute sixteen channels and discard fourteen of them.

#include "flow_convolution.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "runtime.h"

namespace pwcnet {
namespace {

// Rows computed together. What is loaded was then stored long before: a processor waits if it has to load what it is
// just storing in other pieces.
constexpr int64_t kBand = 8;

// Copies a row with a zero before it and zeros after it, up to `width`.
void pad_row(const float* row, int64_t w, float* padded, int64_t width) {
  padded[0] = 0;
  std::memcpy(padded + 1, row, w * sizeof(float));
  std::fill(padded + 1 + w, padded + width, 0.f);
}

int64_t padded_width(int64_t w) { return round_up(w, kLanes) + kLanes; }

}  // namespace

void convolve_to_flow(const float* x, const float* weight, const float* bias, float* flow, const Sizes& sizes) {
  const int64_t n = sizes[kN], c = sizes[kC], h = sizes[kH], w = sizes[kW], width = padded_width(w);
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < n; ++i)
    for (int64_t top = 0; top < h; top += kBand) {
      const int64_t rows = std::min(kBand, h - top);
      // A channel's rows, with those above and below, which stay zero outside the image; sums of both results.
      std::vector<float> padded((kBand + 2) * width), sums(kFlowChannels * kBand * width);
      for (int o = 0; o < kFlowChannels; ++o) std::fill_n(sums.data() + o * kBand * width, kBand * width, bias[o]);
      for (int64_t k = 0; k < c; ++k) {
        for (int64_t y = std::max<int64_t>(top - 1, 0); y < std::min(top + rows + 1, h); ++y)
          pad_row(x + ((i * c + k) * h + y) * w, w, padded.data() + (y - top + 1) * width, width);
        Vector taps[kFlowChannels][kTaps];
        for (int o = 0; o < kFlowChannels; ++o)
          for (int tap = 0; tap < kTaps; ++tap) taps[o][tap] = Vector{} + weight[(o * c + k) * kTaps + tap];
        for (int64_t at = 0; at < w; at += kLanes) {
          Vector window[kTaps];
          for (int tap = 3; tap < kTaps; ++tap)
            window[tap] = load(padded.data() + (tap / 3 - 1) * width + at + tap % 3);
          for (int64_t y = 0; y < rows; ++y) {
            for (int tap = 0; tap < 6; ++tap) window[tap] = window[tap + 3];
            for (int tap = 6; tap < kTaps; ++tap) window[tap] = load(padded.data() + (y + 2) * width + at + tap % 3);
            float* sum = sums.data() + y * width + at;
            Vector u = load(sum), v = load(sum + kBand * width);
#pragma GCC unroll 9
            for (int tap = 0; tap < kTaps; ++tap) {
              u += taps[0][tap] * window[tap];
              v += taps[1][tap] * window[tap];
            }
            store(sum, u);
            store(sum + kBand * width, v);
          }
        }
      }
      for (int o = 0; o < kFlowChannels; ++o)
        for (int64_t y = 0; y < rows; ++y)
          std::memcpy(flow + ((i * kFlowChannels + o) * h + top + y) * w, sums.data() + (o * kBand + y) * width,
                      w * sizeof(float));
    }
}

void convolve_to_flow_gradient(const float* x, const float* weight, const float* gradient, float* x_gradient,
                               float* weight_gradient, float* bias_gradient, const Sizes& sizes) {
  const int64_t n = sizes[kN], c = sizes[kC], h = sizes[kH], w = sizes[kW], width = padded_width(w);
  // The gradient's rows, padded, with one of zeros above and below each image.
  float* rows = scratch.floats(n * kFlowChannels * (h + 2) * width);
  const auto row = [=](int64_t i, int o, int64_t y) {
    return rows + ((i * kFlowChannels + o) * (h + 2) + y + 1) * width;
  };
  for (int o = 0; o < kFlowChannels; ++o) bias_gradient[o] = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int o = 0; o < kFlowChannels; ++o) {
      std::fill_n(row(i, o, -1), width, 0.f);
      std::fill_n(row(i, o, h), width, 0.f);
      const float* plane = gradient + (i * kFlowChannels + o) * h * w;
      double sum = 0;
      for (int64_t p = 0; p < h * w; ++p) sum += plane[p];
      bias_gradient[o] += float(sum);
      for (int64_t y = 0; y < h; ++y) pad_row(plane + y * w, w, row(i, o, y), width);
    }
#pragma omp parallel for schedule(static)
  for (int64_t k = 0; k < c; ++k) {
    std::vector<float> line(width);
    Vector sums[kFlowChannels][kTaps] = {};
    for (int64_t i = 0; i < n; ++i)
      for (int64_t y = 0; y < h; ++y) {
        // Pixel (y, x) of the input contributes to the outputs around it, through the opposite taps.
        const float* value = x + ((i * c + k) * h + y) * w;
        float* result = x_gradient + ((i * c + k) * h + y) * w;
        std::memcpy(line.data(), value, w * sizeof(float));
        std::fill(line.begin() + w, line.end(), 0.f);
        for (int64_t at = 0; at < w; at += kLanes) {
          const Vector here = load(line.data() + at);
          Vector back = {};
#pragma GCC unroll 2
          for (int o = 0; o < kFlowChannels; ++o)
#pragma GCC unroll 3
            for (int dy = 0; dy < 3; ++dy)
#pragma GCC unroll 3
              for (int dx = 0; dx < 3; ++dx) {
                const int tap = 3 * dy + dx;
                const Vector upstream = load(row(i, o, y + 1 - dy) + at + 2 - dx);
                sums[o][tap] += here * upstream;
                back += weight[(o * c + k) * kTaps + tap] * upstream;
              }
          store_part(result + at, back, w - at);
        }
      }
    for (int o = 0; o < kFlowChannels; ++o)
      for (int tap = 0; tap < kTaps; ++tap) {
        float lanes[kLanes], sum = 0;
        store(lanes, sums[o][tap]);
        for (float lane : lanes) sum += lane;
        weight_gradient[(o * c + k) * kTaps + tap] = sum;
      }
  }
}

}  // namespace pwcnet
