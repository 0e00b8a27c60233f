// Bilinear warping on the CPU, and its gradient; defined by `warp` in model/operators.py.

#include <algorithm>
#include <cstdint>

#include "../abi.h"
#include "runtime.h"

namespace pwcnet {
namespace {

// Where a pixel's value comes from: the offset of the upper left of its four taps, how far beyond
// that the place lies, and whether the taps to the right and below are inside (0 or 1). A place
// outside the image has weight 0.
struct Place {
  int32_t offset;
  float weight, a, b;
  int32_t right, below;
};

Place* find_places(const float* flow, int64_t n, int64_t h, int64_t w) {
  Place* places = static_cast<Place*>(scratch.take(n * h * w * sizeof(Place)));
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < n; ++i)
    for (int64_t y = 0; y < h; ++y)
      for (int64_t x = 0; x < w; ++x) {
        const float u = x + flow[(2 * i * h + y) * w + x];
        const float v = y + flow[((2 * i + 1) * h + y) * w + x];
        Place& place = places[(i * h + y) * w + x];
        place = {0, 0.f, 0.f, 0.f, 0, 0};
        if (!(u >= 0 && u <= w - 1 && v >= 0 && v <= h - 1)) continue;  // also where it is NaN
        const int32_t left = int32_t(u), top = int32_t(v);
        place = {int32_t(top * w + left), 1.f, u - left, v - top, left + 1 < w, top + 1 < h};
      }
  return places;
}

struct Taps {
  float top_left, top_right, bottom_left, bottom_right;
};

inline Taps read_taps(const float* plane, const Place& place, int64_t w) {
  const float* at = plane + place.offset;
  const int64_t down = place.below ? w : 0;
  return {at[0], at[place.right] * place.right, at[down] * place.below,
          at[down + place.right] * (place.right & place.below)};
}

void warp(const float* features, const float* flow, float* warped, const Sizes& sizes) {
  const int64_t n = sizes[kN], c = sizes[kC], h = sizes[kH], w = sizes[kW];
  const Place* places = find_places(flow, n, h, w);
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < c; ++k) {
      const float* plane = features + (i * c + k) * h * w;
      float* out = warped + (i * c + k) * h * w;
      for (int64_t p = 0; p < h * w; ++p) {
        const Place& place = places[i * h * w + p];
        const Taps t = read_taps(plane, place, w);
        const float top = t.top_left + place.a * (t.top_right - t.top_left);
        const float bottom = t.bottom_left + place.a * (t.bottom_right - t.bottom_left);
        out[p] = place.weight * (top + place.b * (bottom - top));
      }
    }
}

void warp_gradient(const float* features, const float* flow, const float* gradient, float* feature_gradient,
                   float* flow_gradient, const Sizes& sizes) {
  const int64_t n = sizes[kN], c = sizes[kC], h = sizes[kH], w = sizes[kW];
  const Place* places = find_places(flow, n, h, w);
  // A thread has whole planes, so none adds to another's pixels.
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < c; ++k) {
      const float* upstream = gradient + (i * c + k) * h * w;
      float* plane = feature_gradient + (i * c + k) * h * w;
      std::fill(plane, plane + h * w, 0.f);
      for (int64_t p = 0; p < h * w; ++p) {
        const Place& place = places[i * h * w + p];
        if (place.weight == 0) continue;
        float* at = plane + place.offset;
        const float value = upstream[p], right = value * place.a, left = value - right;
        at[0] += left * (1 - place.b);
        if (place.right) at[1] += right * (1 - place.b);
        if (place.below) at[w] += left * place.b;
        if (place.right && place.below) at[w + 1] += right * place.b;
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
          const Place& place = places[(i * h + y) * w + x];
          const Taps t = read_taps(plane, place, w);
          const float value = place.weight * upstream[x];
          const float across_top = t.top_right - t.top_left;
          const float across_bottom = t.bottom_right - t.bottom_left;
          u_gradient[x] += value * (across_top + place.b * (across_bottom - across_top));
          v_gradient[x] += value * (t.bottom_left - t.top_left + place.a * (across_bottom - across_top));
        }
      }
    }
}

constexpr TensorSpec kFeatures{"features", "float32", 4, {kN, kC, kH, kW}};
constexpr TensorSpec kFlow{"flow", "float32", 4, {kN, 2, kH, kW}};
constexpr TensorSpec kWarped{"warped", "float32", 4, {kN, kC, kH, kW}};
constexpr TensorSpec kGradient{"gradient", "float32", 4, {kN, kC, kH, kW}};
constexpr TensorSpec kFeatureGradient{"feature_gradient", "float32", 4, {kN, kC, kH, kW}};
constexpr TensorSpec kFlowGradient{"flow_gradient", "float32", 4, {kN, 2, kH, kW}};

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
