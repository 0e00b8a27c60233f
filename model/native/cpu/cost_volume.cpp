// The cost volume with its LeakyReLU on the CPU, and its gradient; defined by `cost_volume` in model/operators.py.

#include "../cost_volume.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "runtime.h"

namespace pwcnet {
namespace {

// An image as (N, H, C, width), so that inner loops over channels or displacements read adjacent memory. Each row has
// `margin` zeros before it, and enough after it to read a vector anywhere.
struct Rows {
  float* data;
  int64_t h, c, width;
  const float* at(int64_t n, int64_t y, int64_t channel) const { return data + ((n * h + y) * c + channel) * width; }
};

template <class Value>
Rows make_rows(int64_t n, int64_t c, int64_t h, int64_t w, int64_t margin, Value value) {
  Rows rows{nullptr, h, c, round_up(w, kLanes) + 2 * margin};
  rows.data = scratch.floats(n * h * c * rows.width);
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < n; ++i)
    for (int64_t y = 0; y < h; ++y)
      for (int64_t k = 0; k < c; ++k) {
        float* row = rows.data + ((i * h + y) * c + k) * rows.width;
        std::fill(row, row + margin, 0.f);
        value(row + margin, ((i * c + k) * h + y) * w);
        std::fill(row + margin + w, row + rows.width, 0.f);
      }
  return rows;
}

Rows copy_rows(const float* source, const Sizes& sizes, int64_t margin) {
  const int64_t w = sizes[kW];
  return make_rows(sizes[kN], sizes[kC], sizes[kH], w, margin,
                   [=](float* row, int64_t offset) { std::memcpy(row, source + offset, w * sizeof(float)); });
}

void cost_volume(const float* features1, const float* features2, float* costs, const Sizes& sizes) {
  const int64_t n = sizes[kN], c = sizes[kC], h = sizes[kH], w = sizes[kW];
  const Rows rows1 = copy_rows(features1, sizes, 0), rows2 = copy_rows(features2, sizes, kSearchRange);
  const float scale = 1.f / std::max<int64_t>(c, 1);
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < n; ++i)
    for (int64_t y = 0; y < h; ++y)
      for (int dy = -kSearchRange; dy <= kSearchRange; ++dy)
        for (int64_t x = 0; x < w; x += kLanes) {
          Vector sums[kSide] = {};
          if (y + dy >= 0 && y + dy < h) {
            const float* row1 = rows1.at(i, y, 0) + x;
            const float* row2 = rows2.at(i, y + dy, 0) + x;
            for (int64_t k = 0; k < c; ++k, row1 += rows1.width, row2 += rows2.width) {
              const Vector value = load(row1);
#pragma GCC unroll 16
              for (int dx = 0; dx < kSide; ++dx) sums[dx] += value * load(row2 + dx);
            }
          }
          float* out = costs + ((i * kSide + dy + kSearchRange) * kSide * h + y) * w + x;
          for (int dx = 0; dx < kSide; ++dx) {
            Vector cost = sums[dx] * scale;
            cost = cost > 0 ? cost : cost * kLeakySlope;
            store_part(out + dx * h * w, cost, w - x);
          }
        }
}

void cost_volume_gradient(const float* features1, const float* features2, const float* costs, const float* gradient,
                          float* gradient1, float* gradient2, const Sizes& sizes) {
  constexpr int kGroup = 4;  // channels at a time, so that a gradient is read once for all of them
  const int64_t n = sizes[kN], c = sizes[kC], h = sizes[kH], w = sizes[kW];
  const Rows rows1 = copy_rows(features1, sizes, kSearchRange), rows2 = copy_rows(features2, sizes, kSearchRange);
  const float scale = 1.f / std::max<int64_t>(c, 1);
  // The gradient of the sums of products: before LeakyReLU and the mean over channels.
  const Rows upstream = make_rows(n, kDisplacements, h, w, kSearchRange, [=](float* row, int64_t offset) {
    for (int64_t x = 0; x < w; ++x)
      row[x] = gradient[offset + x] * (costs[offset + x] > 0 ? scale : scale * kLeakySlope);
  });
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < n; ++i)
    for (int64_t y = 0; y < h; ++y)
      for (int64_t first = 0; first < c; first += kGroup)
        for (int64_t x = 0; x < w; x += kLanes) {
          const int64_t group = std::min<int64_t>(kGroup, c - first);
          Vector sums1[kGroup] = {}, sums2[kGroup] = {};
          for (int dy = -kSearchRange; dy <= kSearchRange; ++dy) {
            if (y + dy >= 0 && y + dy < h) {
              // Pixel (y, x) of image 1 is paired with (y + dy, x + dx) of image 2.
              const float* weights = upstream.at(i, y, (dy + kSearchRange) * kSide) + x + kSearchRange;
              const float* other = rows2.at(i, y + dy, first) + x;
#pragma GCC unroll 16
              for (int dx = 0; dx < kSide; ++dx) {
                const Vector weight = load(weights + dx * upstream.width);
                for (int64_t k = 0; k < group; ++k) sums1[k] += weight * load(other + k * rows2.width + dx);
              }
            }
            if (y - dy >= 0 && y - dy < h) {
              // Pixel (y, x) of image 2 is paired with (y - dy, x - dx) of image 1.
              const float* weights = upstream.at(i, y - dy, (dy + kSearchRange) * kSide) + x + 2 * kSearchRange;
              const float* other = rows1.at(i, y - dy, first) + x + 2 * kSearchRange;
#pragma GCC unroll 16
              for (int dx = 0; dx < kSide; ++dx) {
                const Vector weight = load(weights + dx * upstream.width - dx);
                for (int64_t k = 0; k < group; ++k) sums2[k] += weight * load(other + k * rows1.width - dx);
              }
            }
          }
          for (int64_t k = 0; k < group; ++k) {
            const int64_t offset = ((i * c + first + k) * h + y) * w + x;
            store_part(gradient1 + offset, sums1[k], w - x);
            store_part(gradient2 + offset, sums2[k], w - x);
          }
        }
}

}  // namespace

// features1, features2 -> costs after LeakyReLU
PWCNET_OPERATOR(CostVolume) {
  return run(call, {kFeatures1, kFeatures2, kCosts}, [&](const Sizes& sizes) {
    cost_volume(call.data<float>(0), call.data<float>(1), call.data<float>(2), sizes);
    return kOk;
  });
}

// features1, features2, costs after LeakyReLU, gradient of these -> gradient1, gradient2 of the features
PWCNET_OPERATOR(CostVolumeGradient) {
  return run(call, {kFeatures1, kFeatures2, kCosts, kGradient, kGradient1, kGradient2}, [&](const Sizes& sizes) {
    cost_volume_gradient(call.data<float>(0), call.data<float>(1), call.data<float>(2), call.data<float>(3),
                         call.data<float>(4), call.data<float>(5), sizes);
    return kOk;
  });
}

}  // namespace pwcnet
