// The 3x3 convolution without stride by Winograd's minimal filtering, with factors in float32 or bfloat16.
//
// A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.1: F(2x2, 3x3)
// computes 2x2 results from 4x4 inputs with 16 multiplications instead of 36. Inputs and weights are transformed to 16
// points. For each point, a matrix product of tiles by channels and channels by results follows; it takes most of the
// time. The transforms, in float32, add and subtract, which makes rounding errors two to three times as large as those
// of a plain convolution.
//
// With a dilation of d, the pixels of a tile are d apart.

#include "winograd.h"

#include <omp.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "bfloat16.h"
#include "onednn.h"
#include "runtime.h"

namespace pwcnet {
namespace {

constexpr int kPoints = 16;
// Points are kept in words, written as float: a float32 number, or two bfloat16 numbers whose products are summed.
template <class Number>
constexpr int kPack = sizeof(float) / sizeof(Number);
// The results of kStep tiles and kGroup channels are summed in 28 of AVX-512's 32 registers.
constexpr int kStep = 14, kGroup = 2 * kLanes;
// Tiles, and words of inputs or results, that a thread handles together: their points stay in its caches.
constexpr int kTiles = 2 * kStep, kChunk = 128;
// Distance between the points of the tiles. The last term keeps them from sharing the same few lines of a cache.
constexpr int64_t kPoint = kTiles * kChunk + kLanes;

// For the gradient of the weights, words are of one or two tiles. The sums of kGradientStep inputs and kGroup results
// are in registers, those of kInputs and kResults in the caches.
constexpr int kGradientStep = 8, kWords = kTiles, kInputs = 96, kResults = kChunk;

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

// A vector of words from vectors of the kPack numbers in them.
template <class Number>
Vector pack(const Vector* numbers, int64_t distance) {
  if constexpr (kPack<Number> == 1) return numbers[0];
  return pair(numbers[0], numbers[distance]);
}

// The points of a vector of weights, of one input and kLanes results, whose taps are `tap` apart.
void transform_weight(const float* weight, int64_t tap, Vector* points) {
  Vector rows[4][3];
  for (int j = 0; j < 3; ++j) {
    const Vector a = load(weight + j * tap), b = load(weight + (3 + j) * tap), c = load(weight + (6 + j) * tap);
    rows[0][j] = a;
    rows[1][j] = (a + b + c) * 0.5f;
    rows[2][j] = (a - b + c) * 0.5f;
    rows[3][j] = c;
  }
  for (int i = 0; i < 4; ++i) {
    const Vector a = rows[i][0], b = rows[i][1], c = rows[i][2];
    points[4 * i] = a;
    points[4 * i + 1] = (a + b + c) * 0.5f;
    points[4 * i + 2] = (a - b + c) * 0.5f;
    points[4 * i + 3] = c;
  }
}

// Weights (out, in, 3, 3) to words of inputs: (chunks, points, groups of results, words of the chunk, kGroup).
template <class Number>
void transform_weights(const Tiling& tiling, const float* weight, float* transformed) {
  const memory::dims dims{tiling.g.out, tiling.g.in, 3, 3};
  const memory blocked =
      in_layout(wrap(plain(dims), weight), {dims, memory::data_type::f32, memory::format_tag::ABcd16b16a});
  const auto* vectors = static_cast<const float*>(blocked.get_data_handle());
  const int64_t all = tiling.in / kPack<Number>;
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t block = 0; block < tiling.out / kLanes; ++block)
    for (int64_t word = 0; word < all; ++word) {
      Vector points[kPack<Number>][kPoints] = {};
      for (int i = 0; i < kPack<Number> && block * kLanes < tiling.g.out; ++i) {  // else zeros fill the group
        const int64_t channel = word * kPack<Number> + i;
        const float* from = vectors + (block * tiling.in + channel / kLanes * kLanes) * kLanes * kTaps;
        transform_weight(from + channel % kLanes * kLanes, kLanes * kLanes, points[i]);
      }
      const int64_t chunk = word / kChunk * kChunk, words = std::min<int64_t>(kChunk, all - chunk);
      float* to =
          transformed + chunk * kPoints * tiling.out + (block / 2 * words + word - chunk) * kGroup + block % 2 * kLanes;
      for (int point = 0; point < kPoints; ++point)
        store(to + point * words * tiling.out, pack<Number>(points[0] + point, kPoints));
    }
}

// Fetches the last two pixels of some rows of a tile, as far as the tiles before it do not have them, for the next
// block of channels. The processor does not foresee that, because the tiles of a block are few.
template <class Number>
void prefetch(const Number* next, int rows, int64_t row, int64_t pixel) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < 2; ++j) __builtin_prefetch(next + i * row + j * pixel);
}

// Computes the points of a block of channels of a tile, and calls `store_point` with the index and the value of each.
template <class Number, class Function>
void transform_input(const Geometry& g, const BlockedImages<const Number>& x, const Tile& tile, int64_t block,
                     Function store_point) {
  const int64_t d = g.dilation, top = tile.y - d, left = tile.x - d;
  const Number* from = x.data + tile.image * x.image + block * x.block + (top * g.w + left) * kLanes;
  const bool inside = top >= 0 && left >= 0 && top + 3 * d < g.h && left + 3 * d < g.w;
  Vector rows[4][4];
  const auto transform_columns = [&](auto input) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vector a = input(0, j), b = input(1, j), c = input(2, j), e = input(3, j);
      rows[0][j] = a - c;
      rows[1][j] = b + c;
      rows[2][j] = c - b;
      rows[3][j] = b - e;
    }
  };
  const auto at = [=](int i, int j) { return from + (i * d * g.w + j * d) * kLanes; };
  prefetch(at(0, 2) + x.block, 4, d * g.w * kLanes, d * kLanes);
  if (inside) {
    transform_columns([=](int i, int j) { return load(at(i, j)); });
  } else {
    transform_columns([=](int i, int j) {
      const int64_t row = top + i * d, column = left + j * d;
      return row >= 0 && row < g.h && column >= 0 && column < g.w ? load(at(i, j)) : Vector{};
    });
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vector a = rows[i][0], b = rows[i][1], c = rows[i][2], e = rows[i][3];
    store_point(4 * i, a - c);
    store_point(4 * i + 1, b + c);
    store_point(4 * i + 2, c - b);
    store_point(4 * i + 3, b - e);
  }
}

// The same for the gradient of a tile's results.
template <class Number, class Function>
void transform_upstream(const Geometry& g, const BlockedImages<const Number>& upstream, const Tile& tile, int64_t block,
                        Function store_point) {
  const auto [image, top, left] = tile;
  const int64_t d = g.dilation;
  const Number* from = upstream.data + image * upstream.image + block * upstream.block + (top * g.w + left) * kLanes;
  const bool exists = block * kLanes < g.out;
  prefetch(from + upstream.block, 2, d * g.w * kLanes, d * kLanes);
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
    store_point(4 * i, a);
    store_point(4 * i + 1, a + b);
    store_point(4 * i + 2, a - b);
    store_point(4 * i + 3, -b);
  }
}

// Adds the products of the numbers in words.
template <class Number>
Vector add_products(Vector sum, Vector a, Vector b) {
  if constexpr (kPack<Number> == 1) return sum + a * b;
  return add_pairs(sum, a, b);
}

// Multiplies matrices of kRows x count and count x kGroup words, and adds the product to `results` unless it is the
// first. kRow, kColumn and kRightRow are distances: of the left matrix's rows and columns, and of the right one's rows.
template <class Number, int kRows, int64_t kRow, int64_t kColumn, int64_t kRightRow>
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
      const Vector factor = broadcast(left + row * kRow + k * kColumn);
      sums[row][0] = add_products<Number>(sums[row][0], factor, a);
      sums[row][1] = add_products<Number>(sums[row][1], factor, b);
    }
  }
#pragma GCC unroll 14
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) store(results + row * result_row + v * kLanes, sums[row][v]);
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
template <class Result>
void transform_results(const Geometry& g, const float* points, const Tile* tiles, int64_t count, int64_t first,
                       int64_t results, const float* bias, const BlockedImages<Result>& y) {
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
          Result* to = y.data + tiles[t].image * y.image + channel / kLanes * y.block + (row * g.w + column) * kLanes;
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
  // With AMX, oneDNN multiplies bfloat16 numbers eight times as fast, but not with padding of this size.
  const bool faster = !g.bfloat16 || !has_isa(dnnl::cpu_isa::avx512_core_amx) || g.dilation > 8;
  return has_isa(dnnl::cpu_isa::avx512_core) && large && faster && g.stride == 1 && g.out > kLanes;
#else
  return false;  // too few registers
#endif
}

template <class Number, class Result>
void convolve_by_winograd(const Geometry& g, const BlockedImages<const Number>& x, const float* weight,
                          const float* bias, const BlockedImages<Result>& y) {
  constexpr int kBlock = kLanes / kPack<Number>;  // words
  const Tiling tiling(g);
  const auto mark = scratch.mark();
  const int64_t all = tiling.in / kPack<Number>;
  float* weights = scratch.floats(kPoints * all * tiling.out);
  transform_weights<Number>(tiling, weight, weights);
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
    for (int64_t chunk = 0; chunk < all; chunk += kChunk) {
      const int64_t words = std::min<int64_t>(kChunk, all - chunk);
      for (int64_t word = 0; word < words; word += kBlock)
        for (int64_t t = 0; t < count; ++t)
          transform_input(g, x, tiles[t], (chunk + word) / kBlock, [=](int point, Vector value) {
            store(reinterpret_cast<Number*>(inputs + point * kPoint + t * kChunk + word), value);
          });
      for (int point = 0; point < kPoints; ++point)
        for (int64_t out = 0; out < outs; out += kGroup)
          for (int64_t t = 0; t < count; t += kStep)
            multiply<Number, kStep, kChunk, 1, kGroup>(
                inputs + point * kPoint + t * kChunk,
                weights + (chunk * kPoints + point * words) * tiling.out + (first + out) * words, words, chunk == 0,
                results + point * kPoint + t * kChunk + out, kChunk);
    }
    transform_results(g, results, tiles.data(), count, first, outs, biases, y);
  }
  scratch.release(mark);
}

template <class Number>
void differentiate_weights_by_winograd(const Geometry& g, const BlockedImages<const Number>& x,
                                       const BlockedImages<const Number>& upstream, float* weight_gradient,
                                       float* bias_gradient) {
  constexpr int kTogether = kWords * kPack<Number>;  // tiles
  const Tiling tiling(g);
  const auto mark = scratch.mark();
  const int64_t threads = omp_get_max_threads();
  // Rectangles of inputs and results, each in several parts of the tiles, so that all threads have something to do.
  const int64_t columns = (tiling.out + kResults - 1) / kResults,
                rectangles = (tiling.in + kInputs - 1) / kInputs * columns;
  const int64_t batches = (tiling.tiles + kTogether - 1) / kTogether;
  const int64_t parts = std::min(batches, (4 * threads + rectangles - 1) / rectangles);
  constexpr int64_t size = kPoints * kInputs * kResults;
  float* sums = scratch.floats(rectangles * parts * size);
  float* points = scratch.floats(threads * 2 * kPoints * kPoint);
#pragma omp parallel for schedule(dynamic)
  for (int64_t item = 0; item < rectangles * parts; ++item) {
    const int64_t rectangle = item / parts, part = item % parts;
    const int64_t in = rectangle / columns * kInputs, out = rectangle % columns * kResults;
    const int64_t inputs = std::min<int64_t>(kInputs, tiling.in - in),
                  results = std::min<int64_t>(kResults, tiling.out - out);
    float* left = points + omp_get_thread_num() * 2 * kPoints * kPoint;
    float* right = left + kPoints * kPoint;
    for (int64_t batch = batches * part / parts; batch < batches * (part + 1) / parts; ++batch) {
      const int64_t begin = batch * kTogether, count = std::min<int64_t>(kTogether, tiling.tiles - begin);
      const int64_t words = (count + kPack<Number> - 1) / kPack<Number>;
      std::array<Tile, kTogether> tiles;
      for (int64_t t = 0; t < count; ++t) tiles[t] = tiling.tile(begin + t);
      // Both matrices' words, of vectors of channels; a tile that is missing in the last word is zero.
      const auto fill = [&](int64_t channels, float* to, int64_t row, auto transform) {
        for (int64_t channel = 0; channel < channels; channel += kLanes)
          for (int64_t word = 0; word < words; ++word) {
            Vector found[kPack<Number>][kPoints] = {};
            for (int i = 0; i < kPack<Number>; ++i)
              if (const int64_t t = word * kPack<Number> + i; t < count)
                transform(tiles[t], channel / kLanes, [&](int point, Vector value) { found[i][point] = value; });
            for (int point = 0; point < kPoints; ++point)
              store(to + point * kPoint + word * row + channel, pack<Number>(found[0] + point, kPoints));
          }
      };
      fill(inputs, left, kInputs, [&](const Tile& tile, int64_t block, auto store_point) {
        transform_input(g, x, tile, in / kLanes + block, store_point);
      });
      fill(results, right, kResults, [&](const Tile& tile, int64_t block, auto store_point) {
        transform_upstream(g, upstream, tile, out / kLanes + block, store_point);
      });
      for (int point = 0; point < kPoints; ++point)
        for (int64_t o = 0; o < results; o += kGroup)
          for (int64_t i = 0; i < inputs; i += kGradientStep)
            multiply<Number, kGradientStep, 1, kInputs, kResults>(
                left + point * kPoint + i, right + point * kPoint + o, words, batch == batches * part / parts,
                sums + item * size + (point * kInputs + i) * kResults + o, kResults);
    }
  }
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t out = 0; out < g.out; out += kLanes)
    for (int64_t in = 0; in < g.in; ++in) {
      const int64_t rectangle = in / kInputs * columns + out / kResults;
      const float* from = sums + rectangle * parts * size + in % kInputs * kResults + out % kResults;
      Vector found[kPoints] = {}, taps[kTaps];
      for (int64_t part = 0; part < parts; ++part)
        for (int point = 0; point < kPoints; ++point)
          found[point] += load(from + part * size + point * kInputs * kResults);
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
        const Number* from = upstream.data + i * upstream.image + out / kLanes * upstream.block + row * g.w * kLanes;
        Vector sum = {};
        for (int64_t column = 0; column < g.w; ++column) sum += load(from + column * kLanes);
        total += sum;
      }
    store_part(bias_gradient + out, total, g.out - out);
  }
  scratch.release(mark);
}

template void convolve_by_winograd(const Geometry&, const BlockedImages<const float>&, const float*, const float*,
                                   const BlockedImages<float>&);
template void convolve_by_winograd(const Geometry&, const BlockedImages<const Bfloat16>&, const float*, const float*,
                                   const BlockedImages<float>&);
template void convolve_by_winograd(const Geometry&, const BlockedImages<const Bfloat16>&, const float*, const float*,
                                   const BlockedImages<Bfloat16>&);
template void differentiate_weights_by_winograd(const Geometry&, const BlockedImages<const float>&,
                                                const BlockedImages<const float>&, float*, float*);
template void differentiate_weights_by_winograd(const Geometry&, const BlockedImages<const Bfloat16>&,
                                                const BlockedImages<const Bfloat16>&, float*, float*);

}  // namespace pwcnet
