// Bilinear warping on the CPU, and its gradient; defined by `warp` in model/operators.py.

#include "../warp.h"

#include <algorithm>
#include <cstdint>

#include "runtime.h"

namespace pwcnet {
namespace {

// Where a pixel is sampled: the offset of the upper left of its four taps, the distances from there, and whether the
// taps to the right and below are inside (0 or 1). A position outside the image has weight 0.
struct Position {
  int32_t offset;
  float weight, a, b;
  int32_t right, below;
};

Position* find_positions(const float* flow, int64_t n, int64_t h, int64_t w) {
  Position* positions = static_cast<Position*>(scratch.take(n * h * w * sizeof(Position)));
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < n; ++i)
    for (int64_t y = 0; y < h; ++y)
      for (int64_t x = 0; x < w; ++x) {
        const float u = x + flow[(2 * i * h + y) * w + x];
        const float v = y + flow[((2 * i + 1) * h + y) * w + x];
        Position& position = positions[(i * h + y) * w + x];
        position = {0, 0.f, 0.f, 0.f, 0, 0};
        if (!(u >= 0 && u <= w - 1 && v >= 0 && v <= h - 1)) continue;  // also where it is NaN
        const int32_t left = int32_t(u), top = int32_t(v);
        position = {int32_t(top * w + left), 1.f, u - left, v - top, left + 1 < w, top + 1 < h};
      }
  return positions;
}

struct Taps {
  float top_left, top_right, bottom_left, bottom_right;
};

inline Taps read_taps(const float* plane, const Position& position, int64_t w) {
  const float* at = plane + position.offset;
  const int64_t down = position.below ? w : 0;
  return {at[0], at[position.right] * position.right, at[down] * position.below,
          at[down + position.right] * (position.right & position.below)};
}

void warp(const float* features, const float* flow, float* warped, const Sizes& sizes) {
  const int64_t n = sizes[kN], c = sizes[kC], h = sizes[kH], w = sizes[kW];
  const Position* positions = find_positions(flow, n, h, w);
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < c; ++k) {
      const float* plane = features + (i * c + k) * h * w;
      float* out = warped + (i * c + k) * h * w;
      for (int64_t p = 0; p < h * w; ++p) {
        const Position& position = positions[i * h * w + p];
        const Taps t = read_taps(plane, position, w);
        const float top = t.top_left + position.a * (t.top_right - t.top_left);
        const float bottom = t.bottom_left + position.a * (t.bottom_right - t.bottom_left);
        out[p] = position.weight * (top + position.b * (bottom - top));
      }
    }
}

void warp_gradient(const float* features, const float* flow, const float* gradient, float* feature_gradient,
                   float* flow_gradient, const Sizes& sizes) {
  const int64_t n = sizes[kN], c = sizes[kC], h = sizes[kH], w = sizes[kW];
  const Position* positions = find_positions(flow, n, h, w);
  // Each thread has whole planes, so that none adds to another's pixels.
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < c; ++k) {
      const float* upstream = gradient + (i * c + k) * h * w;
      float* plane = feature_gradient + (i * c + k) * h * w;
      std::fill(plane, plane + h * w, 0.f);
      for (int64_t p = 0; p < h * w; ++p) {
        const Position& position = positions[i * h * w + p];
        if (position.weight == 0) continue;
        float* at = plane + position.offset;
        const float value = upstream[p], right = value * position.a, left = value - right;
        at[0] += left * (1 - position.b);
        if (position.right) at[1] += right * (1 - position.b);
        if (position.below) at[w] += left * position.b;
        if (position.right && position.below) at[w + 1] += right * position.b;
      }
    }
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < n; ++i)
    for (int64_t y = 0; y < h; ++y) {
      float* u_gradient = flow_gradient + (2 * i * h + y) * w;
      float* v_gradient = flow_gradient + ((2 * i + 1) * h + y) * w;
      std::fill(u_gradient, u_gradient + w, 0.f);
      std::fill(v_gradient, v_gradient + w, 0.f);
      for (int64_t k = 0; k < c; ++k) {
        const float* plane = features + (i * c + k) * h * w;
        const float* upstream = gradient + ((i * c + k) * h + y) * w;
        for (int64_t x = 0; x < w; ++x) {
          const Position& position = positions[(i * h + y) * w + x];
          const Taps t = read_taps(plane, position, w);
          const float value = position.weight * upstream[x];
          const float across_top = t.top_right - t.top_left;
          const float across_bottom = t.bottom_right - t.bottom_left;
          u_gradient[x] += value * (across_top + position.b * (across_bottom - across_top));
          v_gradient[x] += value * (t.bottom_left - t.top_left + position.a * (across_bottom - across_top));
        }
      }
    }
}

}  // namespace

// features, flow -> warped
PWCNET_OPERATOR(Warp) {
  return run(call, {kFeatures, kFlow, kWarped}, [&](const Sizes& sizes) {
    warp(call.data<float>(0), call.data<float>(1), call.data<float>(2), sizes);
    return kOk;
  });
}

// features, flow, gradient of warped -> feature_gradient, flow_gradient
PWCNET_OPERATOR(WarpGradient) {
  return run(call, {kFeatures, kFlow, kGradient, kFeatureGradient, kFlowGradient}, [&](const Sizes& sizes) {
    warp_gradient(call.data<float>(0), call.data<float>(1), call.data<float>(2), call.data<float>(3),
                  call.data<float>(4), sizes);
    return kOk;
  });
}

}  // namespace pwcnet
