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
// Tiles, and channels of inputs or results, that a thread handles together: their points stay in its caches.
constexpr int kTiles = 2 * kStep, kChunk = 128;
// Distance between the points of the tiles. The last term keeps them from sharing the same few lines of a cache.
constexpr int64_t kPoint = kTiles * kChunk + kLanes;

// The same for the gradient of the weights, which sums products of kGradientStep inputs and kGroup results.
constexpr int kGradientStep = 8, kGradientTiles = 2 * kTiles, kSquare = kChunk / 2;
static_assert(kGradientTiles * kSquare + kLanes == kPoint);

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
    store(points + (4 * i) * kPoint, a - c);
    store(points + (4 * i + 1) * kPoint, b + c);
    store(points + (4 * i + 2) * kPoint, c - b);
    store(points + (4 * i + 3) * kPoint, b - d);
  }
}

// Images to (points, tiles, kSize), for the chunk of up to kSize `channels` that begins with channel `chunk`.
template <int64_t kSize>
void transform_inputs(const Geometry& g, const BlockedImages<const float>& x, const Tile* tiles, int64_t count,
                      int64_t chunk, int64_t channels, float* points) {
  const int64_t d = g.dilation, down = d * g.w * kLanes, right = d * kLanes;
  for (int64_t block = 0; block < channels / kLanes; ++block)
    for (int64_t t = 0; t < count; ++t) {
      const int64_t top = tiles[t].y - d, left = tiles[t].x - d;
      const float* from =
          x.data + tiles[t].image * x.image + (chunk / kLanes + block) * x.block + (top * g.w + left) * kLanes;
      float* to = points + t * kSize + block * kLanes;
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

// Multiplies matrices of kRows x count and count x kGroup numbers, and adds the product to `results` unless it is the
// first. kRow, kColumn and kRightRow are distances: of the left matrix's rows and columns, and of the right one's rows.
template <int kRows, int64_t kRow, int64_t kColumn, int64_t kRightRow>
void multiply(const float* left, const float* right, int64_t count, bool first, float* results, int64_t result_row) {
  Vector sums[kRows][2];
#pragma GCC unroll 14
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) sums[row][v] = first ? Vector{} : load(results + row * result_row + v * kLanes);
  for (int64_t k = 0; k < count; ++k) {
    const Vector a = load(right + k * kRightRow), b = load(right + k * kRightRow + kLanes);
#pragma GCC unroll 14
    for (int row = 0; row < kRows; ++row) {
      const float factor = left[row * kRow + k * kColumn];
      sums[row][0] += factor * a;
      sums[row][1] += factor * b;
    }
  }
#pragma GCC unroll 14
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) store(results + row * result_row + v * kLanes, sums[row][v]);
}

// The gradients of a tile's results to those of its points: (points, tiles, kSquare), for `channels` from `first` on.
void transform_upstream(const Geometry& g, const BlockedImages<const float>& upstream, const Tile* tiles, int64_t count,
                        int64_t first, int64_t channels, float* points) {
  const int64_t d = g.dilation;
  for (int64_t block = 0; block < channels / kLanes; ++block)
    for (int64_t t = 0; t < count; ++t) {
      const auto [image, top, left] = tiles[t];
      const float* from = upstream.data + image * upstream.image + (first / kLanes + block) * upstream.block +
                          (top * g.w + left) * kLanes;
      float* to = points + t * kSquare + block * kLanes;
      const bool exists = first + block * kLanes < g.out;
      Vector rows[4][2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const bool inside = exists && left + j * d < g.w;
        const Vector a = inside && top < g.h ? load(from + j * d * kLanes) : Vector{};
        const Vector b = inside && top + d < g.h ? load(from + (d * g.w + j * d) * kLanes) : Vector{};
        rows[0][j] = a;
        rows[1][j] = a + b;
        rows[2][j] = a - b;
        rows[3][j] = -b;
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Vector a = rows[i][0], b = rows[i][1];
        store(to + (4 * i) * kPoint, a);
        store(to + (4 * i + 1) * kPoint, a + b);
        store(to + (4 * i + 2) * kPoint, a - b);
        store(to + (4 * i + 3) * kPoint, -b);
      }
    }
}

// The gradients of a vector of weights, of one input and kLanes results, from those of its points.
void transform_gradients(const Vector* points, Vector* taps) {
  Vector rows[3][4];
  for (int j = 0; j < 4; ++j) {
    const Vector a = points[j], b = points[4 + j], c = points[8 + j], d = points[12 + j];
    rows[0][j] = a + (b + c) * 0.5f;
    rows[1][j] = (b - c) * 0.5f;
    rows[2][j] = (b + c) * 0.5f + d;
  }
  for (int i = 0; i < 3; ++i) {
    const Vector a = rows[i][0], b = rows[i][1], c = rows[i][2], d = rows[i][3];
    taps[3 * i] = a + (b + c) * 0.5f;
    taps[3 * i + 1] = (b - c) * 0.5f;
    taps[3 * i + 2] = (b + c) * 0.5f + d;
  }
}

// (points, tiles, kChunk) to the images of `results` that begin with channel `first`, with their biases.
void transform_results(const Geometry& g, const float* points, const Tile* tiles, int64_t count, int64_t first,
                       int64_t results, const float* bias, const BlockedImages<float>& y) {
  const int64_t d = g.dilation, last = std::min(first + results, g.out);
  for (int64_t channel = first; channel < last; channel += kLanes) {
    const Vector offset = load(bias + channel);
    for (int64_t t = 0; t < count; ++t) {
      const float* from = points + t * kChunk + channel - first;
      Vector rows[2][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vector a = load(from + j * kPoint), b = load(from + (4 + j) * kPoint), c = load(from + (8 + j) * kPoint),
                     e = load(from + (12 + j) * kPoint);
        rows[0][j] = a + b + c;
        rows[1][j] = b - c - e;
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const Vector *r = rows[i], sums[2] = {r[0] + r[1] + r[2], r[1] - r[2] - r[3]};
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          const int64_t row = tiles[t].y + i * d, column = tiles[t].x + j * d;
          if (row >= g.h || column >= g.w) continue;
          float* to = y.data + tiles[t].image * y.image + channel / kLanes * y.block + (row * g.w + column) * kLanes;
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
  static const auto wanted = static_cast<unsigned>(dnnl::cpu_isa::avx512_core);
  static const bool enabled = (static_cast<unsigned>(dnnl::get_effective_cpu_isa()) & wanted) == wanted;
  // Few pixels are not worth the transform of the weights; of tiles as large as an image, much lies outside.
  const bool large = g.n * g.h * g.w >= 200 && std::min(g.h, g.w) >= 4 * g.dilation;
  // oneDNN multiplies bfloat16 numbers twice as fast, but not with padding of this size.
  const bool precise = !g.bfloat16 || g.dilation > 8;
  return enabled && large && precise && g.stride == 1 && g.out > kLanes;
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
  const int64_t threads = omp_get_max_threads(), together = tiling.tiles < threads * kTiles ? kStep : kTiles;
  const int64_t batches = (tiling.tiles + together - 1) / together, chunks = (tiling.out + kChunk - 1) / kChunk;
  float* points = scratch.floats(threads * 2 * kPoints * kPoint);
#pragma omp parallel for schedule(dynamic)
  for (int64_t item = 0; item < batches * chunks; ++item) {
    float* inputs = points + omp_get_thread_num() * 2 * kPoints * kPoint;
    float* results = inputs + kPoints * kPoint;
    const int64_t begin = item / chunks * together, count = std::min(together, tiling.tiles - begin);
    const int64_t first = item % chunks * kChunk, outs = std::min<int64_t>(kChunk, tiling.out - first);
    std::array<Tile, kTiles> tiles;
    for (int64_t t = 0; t < count; ++t) tiles[t] = tiling.tile(begin + t);
    for (int64_t chunk = 0; chunk < tiling.in; chunk += kChunk) {
      const int64_t channels = std::min<int64_t>(kChunk, tiling.in - chunk);
      transform_inputs<kChunk>(g, x, tiles.data(), count, chunk, channels, inputs);
      for (int point = 0; point < kPoints; ++point)
        for (int64_t out = 0; out < outs; out += kGroup)
          for (int64_t t = 0; t < count; t += kStep)
            multiply<kStep, kChunk, 1, kGroup>(
                inputs + point * kPoint + t * kChunk,
                weights + (chunk * kPoints + point * channels) * tiling.out + (first + out) * channels, channels,
                chunk == 0, results + point * kPoint + t * kChunk + out, kChunk);
    }
    transform_results(g, results, tiles.data(), count, first, outs, biases, y);
  }
  scratch.release(mark);
}

void differentiate_weights_by_winograd(const Geometry& g, const BlockedImages<const float>& x,
                                       const BlockedImages<const float>& upstream, float* weight_gradient,
                                       float* bias_gradient) {
  const Tiling tiling(g);
  const auto mark = scratch.mark();
  const int64_t threads = omp_get_max_threads();
  // Squares of inputs and results, each in several parts of the tiles, so that all threads have something to do.
  const int64_t columns = (tiling.out + kSquare - 1) / kSquare, squares = (tiling.in + kSquare - 1) / kSquare * columns;
  const int64_t batches = (tiling.tiles + kGradientTiles - 1) / kGradientTiles;
  const int64_t parts = std::min(batches, (4 * threads + squares - 1) / squares);
  constexpr int64_t size = kPoints * kSquare * kSquare;
  float* sums = scratch.floats(squares * parts * size);
  float* points = scratch.floats(threads * 2 * kPoints * kPoint);
#pragma omp parallel for schedule(dynamic)
  for (int64_t item = 0; item < squares * parts; ++item) {
    const int64_t square = item / parts, part = item % parts;
    const int64_t in = square / columns * kSquare, out = square % columns * kSquare;
    const int64_t inputs = std::min<int64_t>(kSquare, tiling.in - in),
                  results = std::min<int64_t>(kSquare, tiling.out - out);
    float* left = points + omp_get_thread_num() * 2 * kPoints * kPoint;
    float* right = left + kPoints * kPoint;
    for (int64_t batch = batches * part / parts; batch < batches * (part + 1) / parts; ++batch) {
      std::array<Tile, kGradientTiles> tiles;
      const int64_t begin = batch * kGradientTiles, count = std::min<int64_t>(kGradientTiles, tiling.tiles - begin);
      for (int64_t t = 0; t < count; ++t) tiles[t] = tiling.tile(begin + t);
      transform_inputs<kSquare>(g, x, tiles.data(), count, in, inputs, left);
      transform_upstream(g, upstream, tiles.data(), count, out, results, right);
      for (int point = 0; point < kPoints; ++point)
        for (int64_t o = 0; o < results; o += kGroup)
          for (int64_t i = 0; i < inputs; i += kGradientStep)
            multiply<kGradientStep, 1, kSquare, kSquare>(
                left + point * kPoint + i, right + point * kPoint + o, count, batch == batches * part / parts,
                sums + item * size + (point * kSquare + i) * kSquare + o, kSquare);
    }
  }
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t out = 0; out < g.out; out += kLanes)
    for (int64_t in = 0; in < g.in; ++in) {
      const int64_t square = in / kSquare * columns + out / kSquare;
      const float* from = sums + square * parts * size + in % kSquare * kSquare + out % kSquare;
      Vector found[kPoints] = {}, taps[kTaps];
      for (int64_t part = 0; part < parts; ++part)
        for (int point = 0; point < kPoints; ++point)
          found[point] += load(from + part * size + point * kSquare * kSquare);
      transform_gradients(found, taps);
      for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, g.out - out); ++lane)
        for (int tap = 0; tap < kTaps; ++tap)
          weight_gradient[((out + lane) * g.in + in) * kTaps + tap] = taps[tap][lane];
    }
#pragma omp parallel for schedule(static)
  for (int64_t out = 0; out < g.out; out += kLanes) {
    Vector total = {};
    for (int64_t i = 0; i < g.n; ++i)
      for (int64_t row = 0; row < g.h; ++row) {
        const float* from = upstream.data + i * upstream.image + out / kLanes * upstream.block + row * g.w * kLanes;
        Vector sum = {};
        for (int64_t column = 0; column < g.w; ++column) sum += load(from + column * kLanes);
        total += sum;
      }
    store_part(bias_gradient + out, total, g.out - out);
  }
  scratch.release(mark);
}

}  // namespace pwcnet
