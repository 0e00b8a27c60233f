// The 3x3 convolution without stride in float32 by Winograd's minimal filtering.
//
// A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.1: F(2x2, 3x3)
// computes 2x2 results from 4x4 inputs with 16 multiplications instead of 36. Inputs and weights are transformed to 16
// points. For each point, a matrix product of tiles by channels and channels by results follows; it takes most of the
// time. The transforms add and subtract, which makes rounding errors two to three times as large as oneDNN's.
//
// With a dilation of d, the pixels of a tile are d apart.

#include "winograd.h"

#include <omp.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "onednn.h"
#include "runtime.h"

namespace pwcnet {
namespace {

constexpr int kPoints = 16;
// The results of kStep tiles and kGroup channels are summed in 28 of AVX-512's 32 registers.
constexpr int kStep = 14, kGroup = 2 * kLanes;
// Tiles, and channels of the inputs, that a thread handles together: their points stay in its caches.
constexpr int kTiles = 2 * kStep, kChunk = 128;
// Distance between the points of the inputs. The last term keeps them from sharing the same few lines of a cache.
constexpr int64_t kInputPoint = kTiles * kChunk + kLanes;

struct Tile {
  int64_t image, y, x;  // of its first result
};

// A convolution in tiles.
struct Tiling {
  Geometry g;
  int64_t in, out;               // channels, filled up to whole vectors and to whole groups
  int64_t rows, columns, tiles;  // tiles of an image, and of all

  explicit Tiling(const Geometry& g)
      : g(g),
        in(round_up(g.in, kLanes)),
        out(round_up(g.out, kGroup)),
        rows(round_up(g.h, 2 * g.dilation) / 2),
        columns(round_up(g.w, 2 * g.dilation) / 2),
        tiles(g.n * rows * columns) {}

  int64_t result_point() const { return kTiles * out + kLanes; }

  Tile tile(int64_t index) const {
    const int64_t d = g.dilation, row = index / columns % rows, column = index % columns;
    return {index / (rows * columns), row / d * 2 * d + row % d, column / d * 2 * d + column % d};
  }
};

// Weights (out, in, 3, 3) to (chunks of channels, points, groups of results, channels of the chunk, kGroup).
void transform_weights(const Tiling& tiling, const float* weight, float* transformed) {
  const memory::dims dims{tiling.g.out, tiling.g.in, 3, 3};
  const memory blocked =
      in_layout(wrap(plain(dims), weight), {dims, memory::data_type::f32, memory::format_tag::ABcd16b16a});
  const auto* vectors = static_cast<const float*>(blocked.get_data_handle());
  constexpr int64_t tap = kLanes * kLanes;
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t block = 0; block < tiling.out / kLanes; ++block)
    for (int64_t channel = 0; channel < tiling.in; ++channel) {
      Vector rows[4][3] = {};
      if (block * kLanes < tiling.g.out) {  // else zeros fill the group
        const float* from =
            vectors + (block * tiling.in + channel / kLanes * kLanes) * kLanes * kTaps + channel % kLanes * kLanes;
        for (int j = 0; j < 3; ++j) {
          const Vector a = load(from + j * tap), b = load(from + (3 + j) * tap), c = load(from + (6 + j) * tap);
          rows[0][j] = a;
          rows[1][j] = (a + b + c) * 0.5f;
          rows[2][j] = (a - b + c) * 0.5f;
          rows[3][j] = c;
        }
      }
      const int64_t chunk = channel / kChunk * kChunk, channels = std::min<int64_t>(kChunk, tiling.in - chunk);
      float* to = transformed + chunk * kPoints * tiling.out + (block / 2 * channels + channel - chunk) * kGroup +
                  block % 2 * kLanes;
      const int64_t point = channels * tiling.out;
      for (int i = 0; i < 4; ++i) {
        const Vector a = rows[i][0], b = rows[i][1], c = rows[i][2];
        store(to + (4 * i) * point, a);
        store(to + (4 * i + 1) * point, (a + b + c) * 0.5f);
        store(to + (4 * i + 2) * point, (a - b + c) * 0.5f);
        store(to + (4 * i + 3) * point, c);
      }
    }
}

// The points of a block of channels of a tile, whose pixels `input` loads by row and column.
template <class Input>
void transform_tile(Input input, float* points) {
  Vector rows[4][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vector a = input(0, j), b = input(1, j), c = input(2, j), d = input(3, j);
    rows[0][j] = a - c;
    rows[1][j] = b + c;
    rows[2][j] = c - b;
    rows[3][j] = b - d;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vector a = rows[i][0], b = rows[i][1], c = rows[i][2], d = rows[i][3];
    store(points + (4 * i) * kInputPoint, a - c);
    store(points + (4 * i + 1) * kInputPoint, b + c);
    store(points + (4 * i + 2) * kInputPoint, c - b);
    store(points + (4 * i + 3) * kInputPoint, b - d);
  }
}

// Images to (points, tiles, kChunk), for the chunk of `channels` that begins with channel `chunk`.
void transform_inputs(const Geometry& g, const BlockedImages<const float>& x, const Tile* tiles, int64_t count,
                      int64_t chunk, int64_t channels, float* points) {
  const int64_t d = g.dilation, down = d * g.w * kLanes, right = d * kLanes;
  for (int64_t block = 0; block < channels / kLanes; ++block)
    for (int64_t t = 0; t < count; ++t) {
      const int64_t top = tiles[t].y - d, left = tiles[t].x - d;
      const float* from =
          x.data + tiles[t].image * x.image + (chunk / kLanes + block) * x.block + (top * g.w + left) * kLanes;
      float* to = points + t * kChunk + block * kLanes;
      if (top >= 0 && left >= 0 && top + 3 * d < g.h && left + 3 * d < g.w) {
        transform_tile([=](int i, int j) { return load(from + i * down + j * right); }, to);
      } else {
        const auto load_inside = [=](int i, int j) {
          const int64_t row = top + i * d, column = left + j * d;
          const bool inside = row >= 0 && row < g.h && column >= 0 && column < g.w;
          return inside ? load(from + i * down + j * right) : Vector{};
        };
        transform_tile(load_inside, to);
      }
    }
}

// At one point, multiplies a chunk of the channels of kStep tiles with the weights of a group of results. Adds to
// `results` unless it is the first chunk.
void multiply(const float* inputs, const float* weights, int64_t channels, bool first, float* results,
              int64_t result_tile) {
  Vector sums[kStep][2];
#pragma GCC unroll 14
  for (int t = 0; t < kStep; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) sums[t][v] = first ? Vector{} : load(results + t * result_tile + v * kLanes);
  for (int64_t k = 0; k < channels; ++k) {
    const Vector a = load(weights + k * kGroup), b = load(weights + k * kGroup + kLanes);
#pragma GCC unroll 14
    for (int t = 0; t < kStep; ++t) {
      const float input = inputs[t * kChunk + k];
      sums[t][0] += input * a;
      sums[t][1] += input * b;
    }
  }
#pragma GCC unroll 14
  for (int t = 0; t < kStep; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) store(results + t * result_tile + v * kLanes, sums[t][v]);
}

// (points, tiles, results) to images, with a bias for every result.
void transform_results(const Tiling& tiling, const float* points, const Tile* tiles, int64_t count, const float* bias,
                       const BlockedImages<float>& y) {
  const Geometry& g = tiling.g;
  const int64_t point = tiling.result_point(), d = g.dilation;
  for (int64_t block = 0; block * kLanes < g.out; ++block) {
    const Vector offset = load(bias + block * kLanes);
    for (int64_t t = 0; t < count; ++t) {
      const float* from = points + t * tiling.out + block * kLanes;
      Vector rows[2][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vector a = load(from + j * point), b = load(from + (4 + j) * point), c = load(from + (8 + j) * point),
                     last = load(from + (12 + j) * point);
        rows[0][j] = a + b + c;
        rows[1][j] = b - c - last;
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const Vector *r = rows[i], sums[2] = {r[0] + r[1] + r[2], r[1] - r[2] - r[3]};
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          const int64_t row = tiles[t].y + i * d, column = tiles[t].x + j * d;
          if (row >= g.h || column >= g.w) continue;
          float* to = y.data + tiles[t].image * y.image + block * y.block + (row * g.w + column) * kLanes;
          Vector value = sums[j] + (g.after == kAdd ? load(to) : offset);
          if (g.after == kLeaky) value = value > 0 ? value : value * kLeakySlope;
          store(to, value);
        }
      }
    }
  }
}

}  // namespace

bool suits_winograd(const Geometry& g) {
#ifdef __AVX512F__
  // Few pixels are not worth the transform of the weights; of tiles as large as an image, much lies outside.
  const bool large = g.n * g.h * g.w >= 200 && std::min(g.h, g.w) >= 4 * g.dilation;
  // oneDNN multiplies bfloat16 numbers twice as fast, but without padding of this size.
  const bool precise = !g.bfloat16 || g.dilation > 8;
  return large && precise && g.stride == 1 && g.out > kLanes && (g.block == 0 || g.block == kLanes);
#else
  return false;  // too few registers
#endif
}

void convolve_by_winograd(const Geometry& g, const BlockedImages<const float>& x, const float* weight,
                          const float* bias, const BlockedImages<float>& y) {
  const Tiling tiling(g);
  const auto mark = scratch.mark();
  float* weights = scratch.floats(kPoints * tiling.in * tiling.out);
  transform_weights(tiling, weight, weights);
  float* biases = scratch.floats(tiling.out);
  std::fill_n(biases, tiling.out, 0.f);
  if (bias) std::copy_n(bias, g.out, biases);
  const int64_t threads = omp_get_max_threads(), own = kPoints * (kInputPoint + tiling.result_point());
  float* points = scratch.floats(threads * own);
  const int64_t together = tiling.tiles < threads * kTiles ? kStep : kTiles;
#pragma omp parallel for schedule(dynamic)
  for (int64_t begin = 0; begin < tiling.tiles; begin += together) {
    float *inputs = points + omp_get_thread_num() * own, *results = inputs + kPoints * kInputPoint;
    std::array<Tile, kTiles> tiles;
    const int64_t count = std::min(together, tiling.tiles - begin);
    for (int64_t t = 0; t < count; ++t) tiles[t] = tiling.tile(begin + t);
    for (int64_t chunk = 0; chunk < tiling.in; chunk += kChunk) {
      const int64_t channels = std::min<int64_t>(kChunk, tiling.in - chunk);
      transform_inputs(g, x, tiles.data(), count, chunk, channels, inputs);
      for (int point = 0; point < kPoints; ++point)
        for (int64_t out = 0; out < tiling.out; out += kGroup)
          for (int64_t t = 0; t < count; t += kStep)
            multiply(inputs + point * kInputPoint + t * kChunk,
                     weights + (chunk * kPoints + point * channels) * tiling.out + out * channels, channels, chunk == 0,
                     results + point * tiling.result_point() + t * tiling.out + out, tiling.out);
    }
    transform_results(tiling, results, tiles.data(), count, biases, y);
  }
  scratch.release(mark);
}

}  // namespace pwcnet
