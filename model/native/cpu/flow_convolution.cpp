// The 3x3 convolution that gives a flow, on the CPU: two channels out of hundreds.
//
// A library's kernels compute sixteen channels and discard fourteen of them. Here the lanes of a vector are the
// channels of x, whose sum is taken last.

#include "flow_convolution.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bfloat16.h"
#include "runtime.h"

namespace pwcnet {
namespace {

// Pixels of a row computed together, whose sums are in registers.
constexpr int kTogether = 8;

template <int kBlock>
struct Block {
  typedef float Type __attribute__((vector_size(kBlock * sizeof(float)), aligned(4), may_alias));
};

template <int kBlock>
using Lanes = typename Block<kBlock>::Type;

template <int kBlock>
Lanes<kBlock> load_block(const float* at) {
  return *reinterpret_cast<const Lanes<kBlock>*>(at);
}
template <int kBlock>
Lanes<kBlock> load_block(const Bfloat16* at) {
  static_assert(kBlock == kLanes);
  return load(at);
}

template <int kBlock>
void store_block(float* at, Lanes<kBlock> value) {
  *reinterpret_cast<Lanes<kBlock>*>(at) = value;
}
template <int kBlock>
void store_block(Bfloat16* at, Lanes<kBlock> value) {
  static_assert(kBlock == kLanes);
  store(at, value);
}

// Weights (2, C, 3, 3) of `count` channels from `first` on, as (blocks, taps, 2, kBlock) filled up with zeros.
template <int kBlock>
float* pack_weights(const Geometry& g, const float* weight, int64_t first, int64_t count) {
  const int64_t size = round_up(count, kBlock) * kTaps * kFlowChannels;
  float* packed = scratch.floats(size);
  std::fill_n(packed, size, 0.f);
  for (int64_t k = 0; k < count; ++k)
    for (int tap = 0; tap < kTaps; ++tap)
      for (int o = 0; o < kFlowChannels; ++o)
        packed[((k / kBlock * kTaps + tap) * kFlowChannels + o) * kBlock + k % kBlock] =
            weight[(o * g.in + first + k) * kTaps + tap];
  return packed;
}

// The gradient of a flow with zeros around each image.
class PaddedGradient {
 public:
  PaddedGradient(const Geometry& g, const float* gradient)
      : h_(g.h + 2), w_(g.w + 2), data_(scratch.floats(g.n * kFlowChannels * h_ * w_)) {
    std::fill_n(data_, g.n * kFlowChannels * h_ * w_, 0.f);
    for (int64_t plane = 0; plane < g.n * kFlowChannels; ++plane)
      for (int64_t y = 0; y < g.h; ++y)
        std::memcpy(data_ + (plane * h_ + y + 1) * w_ + 1, gradient + (plane * g.h + y) * g.w, g.w * sizeof(float));
  }

  // What a pixel of x is multiplied by for a tap, for the first pixel of a row.
  const float* row(int64_t image, int o, int64_t y, int tap) const {
    return data_ + ((image * kFlowChannels + o) * h_ + y + 2 - tap / 3) * w_ + 2 - tap % 3;
  }

 private:
  int64_t h_, w_;
  float* data_;
};

// The rows of a flow's gradient that are multiplied with a row of x.
struct GradientRows {
  const float* rows[kFlowChannels][kTaps];

  GradientRows(const PaddedGradient& padded, int64_t image, int64_t y) {
    for (int o = 0; o < kFlowChannels; ++o)
      for (int tap = 0; tap < kTaps; ++tap) rows[o][tap] = padded.row(image, o, y, tap);
  }
};

}  // namespace

template <int kBlock, class Number>
void convolve_to_flow(const Geometry& g, const BlockedImages<const Number>& x, const float* weight, const float* bias,
                      float* flow) {
  const auto mark = scratch.mark();
  const int64_t blocks = round_up(g.in, kBlock) / kBlock;
  const float* weights = pack_weights<kBlock>(g, weight, 0, g.in);
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < g.n; ++i)
    for (int64_t y = 0; y < g.h; ++y)
      for (int64_t left = 0; left < g.w; left += kTogether) {
        Lanes<kBlock> sums[kFlowChannels][kTogether] = {};
        const bool inside = left > 0 && left + kTogether < g.w;
        for (int64_t block = 0; block < blocks; ++block)
          for (int64_t dy = y > 0 ? 0 : 1; dy < (y + 1 < g.h ? 3 : 2); ++dy) {
            const Number* row = x.data + i * x.image + block * x.block + ((y + dy - 1) * g.w + left - 1) * kBlock;
            Lanes<kBlock> taps[3][kFlowChannels];
            for (int dx = 0; dx < 3; ++dx)
              for (int o = 0; o < kFlowChannels; ++o)
                taps[dx][o] =
                    load_block<kBlock>(weights + ((block * kTaps + dy * 3 + dx) * kFlowChannels + o) * kBlock);
            const auto add = [&](auto exists) {
#pragma GCC unroll 10
              for (int column = 0; column < kTogether + 2; ++column) {
                if (!exists(column)) continue;
                const Lanes<kBlock> value = load_block<kBlock>(row + column * kBlock);
#pragma GCC unroll 3
                for (int dx = 0; dx < 3; ++dx) {
                  const int pixel = column - dx;
                  if (pixel < 0 || pixel >= kTogether) continue;
                  sums[0][pixel] += taps[dx][0] * value;
                  sums[1][pixel] += taps[dx][1] * value;
                }
              }
            };
            if (inside) {
              add([](int) { return true; });
            } else {
              add([=](int column) { return left + column > 0 && left + column <= g.w; });
            }
          }
        for (int o = 0; o < kFlowChannels; ++o)
          for (int64_t pixel = 0; pixel < std::min<int64_t>(kTogether, g.w - left); ++pixel) {
            float sum = bias[o];
            for (int lane = 0; lane < kBlock; ++lane) sum += sums[o][pixel][lane];
            flow[((i * kFlowChannels + o) * g.h + y) * g.w + left + pixel] = sum;
          }
      }
  scratch.release(mark);
}

template <int kBlock, class Number>
void differentiate_flow_weights(const Geometry& g, const BlockedImages<const Number>& x, const float* gradient,
                                float* weight_gradient, float* bias_gradient) {
  const auto mark = scratch.mark();
  for (int o = 0; o < kFlowChannels; ++o) {
    double sum = 0;
    for (int64_t i = 0; i < g.n; ++i)
      for (int64_t p = 0; p < g.h * g.w; ++p) sum += gradient[(i * kFlowChannels + o) * g.h * g.w + p];
    bias_gradient[o] = float(sum);
  }
  const PaddedGradient padded(g, gradient);
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < round_up(g.in, kBlock) / kBlock; ++block) {
    Lanes<kBlock> totals[kFlowChannels][kTaps] = {};
    for (int64_t i = 0; i < g.n; ++i)
      for (int64_t y = 0; y < g.h; ++y) {
        const Number* row = x.data + i * x.image + block * x.block + y * g.w * kBlock;
        const GradientRows upstream(padded, i, y);
        Lanes<kBlock> sums[kFlowChannels][kTaps] = {};
        for (int64_t column = 0; column < g.w; ++column) {
          const Lanes<kBlock> value = load_block<kBlock>(row + column * kBlock);
#pragma GCC unroll 2
          for (int o = 0; o < kFlowChannels; ++o)
#pragma GCC unroll 9
            for (int tap = 0; tap < kTaps; ++tap) sums[o][tap] += value * upstream.rows[o][tap][column];
        }
        for (int o = 0; o < kFlowChannels; ++o)
          for (int tap = 0; tap < kTaps; ++tap) totals[o][tap] += sums[o][tap];
      }
    for (int64_t k = block * kBlock; k < std::min(g.in, (block + 1) * kBlock); ++k)
      for (int o = 0; o < kFlowChannels; ++o)
        for (int tap = 0; tap < kTaps; ++tap)
          weight_gradient[(o * g.in + k) * kTaps + tap] = totals[o][tap][k % kBlock];
  }
  scratch.release(mark);
}

template <int kBlock, class Number, class Result>
void differentiate_flow_input(const Geometry& g, const float* weight, const float* gradient, int64_t first,
                              int64_t count, const BlockedImages<const Number>& others,
                              const BlockedImages<Result>& x_gradient) {
  const auto mark = scratch.mark();
  const float* weights = pack_weights<kBlock>(g, weight, first, count);
  const PaddedGradient padded(g, gradient);
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t block = 0; block < round_up(count, kBlock) / kBlock; ++block)
    for (int64_t i = 0; i < g.n; ++i) {
      Lanes<kBlock> taps[kFlowChannels][kTaps];
      for (int o = 0; o < kFlowChannels; ++o)
        for (int tap = 0; tap < kTaps; ++tap)
          taps[o][tap] = load_block<kBlock>(weights + ((block * kTaps + tap) * kFlowChannels + o) * kBlock);
      for (int64_t y = 0; y < g.h; ++y) {
        const int64_t start = y * g.w * kBlock;
        const Number* other = others.data ? others.data + i * others.image + block * others.block + start : nullptr;
        Result* row = x_gradient.data + i * x_gradient.image + block * x_gradient.block + start;
        const GradientRows upstream(padded, i, y);
        for (int64_t column = 0; column < g.w; ++column) {
          Lanes<kBlock> sum = other ? load_block<kBlock>(other + column * kBlock) : Lanes<kBlock>{};
#pragma GCC unroll 2
          for (int o = 0; o < kFlowChannels; ++o)
#pragma GCC unroll 9
            for (int tap = 0; tap < kTaps; ++tap) sum += taps[o][tap] * upstream.rows[o][tap][column];
          store_block<kBlock>(row + column * kBlock, sum);
        }
      }
    }
  scratch.release(mark);
}

#define PWCNET_FLOW_CONVOLUTION(kBlock, Number)                                                                       \
  template void convolve_to_flow<kBlock>(const Geometry&, const BlockedImages<const Number>&, const float*,           \
                                         const float*, float*);                                                       \
  template void differentiate_flow_weights<kBlock>(const Geometry&, const BlockedImages<const Number>&, const float*, \
                                                   float*, float*);                                                   \
  template void differentiate_flow_input<kBlock>(const Geometry&, const float*, const float*, int64_t, int64_t,       \
                                                 const BlockedImages<const Number>&, const BlockedImages<float>&);

PWCNET_FLOW_CONVOLUTION(8, float)
PWCNET_FLOW_CONVOLUTION(kLanes, float)
PWCNET_FLOW_CONVOLUTION(kLanes, Bfloat16)
template void differentiate_flow_input<kLanes>(const Geometry&, const float*, const float*, int64_t, int64_t,
                                               const BlockedImages<const Bfloat16>&, const BlockedImages<Bfloat16>&);

}  // namespace pwcnet
