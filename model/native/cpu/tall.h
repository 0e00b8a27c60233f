// The layout of a flow estimator's features, which the convolutions that make and read them share.
//
// A tensor (1, blocks, N, H + 1, W, block): blocks of channels, in each of which the images of a batch lie below each
// other with a row after each, as one tall image. What a oneDNN convolution reads of some of the blocks is then
// contiguous; the row, if it is zero, takes the place of the padding. Zeros fill up the last block.
#pragma once

#include <cstdint>
#include <cstring>

#include "bfloat16.h"
#include "onednn.h"
#include "winograd.h"

namespace pwcnet {

template <class Number>
constexpr memory::data_type type_of_number = sizeof(Number) == 2 ? memory::data_type::bf16 : memory::data_type::f32;

struct TallLayout {
  int64_t n, h, w;
  int64_t block;  // channels: 8 or 16

  int64_t rows() const { return n * (h + 1); }
  int64_t plane() const { return h * w; }
  int64_t blocks(int64_t channels) const { return (channels + block - 1) / block; }
  // Numbers in so many channels.
  int64_t size(int64_t channels) const { return blocks(channels) * block * rows() * w; }

  template <class Number>
  BlockedImages<Number> images(Number* data) const {
    return {data, (h + 1) * w * block, rows() * w * block};
  }

  // oneDNN's description of an image's channels, a multiple of a block.
  memory::desc image(int64_t channels, memory::data_type type, int64_t i) const {
    const auto tag = block == 16 ? memory::format_tag::aBcd16b : memory::format_tag::aBcd8b;
    return memory::desc({1, channels, rows(), w}, type, tag)
        .submemory_desc({1, channels, h, w}, {0, 0, i * (h + 1), 0});
  }

  // Copies `channels` of NCHW images of `total` channels. The rows after the images stay as they are.
  template <class Number>
  void pack(const float* from, int64_t total, int64_t channels, Number* to) const {
    const int64_t whole = channels / block * block, rest = channels - whole, row = w * block;
    for (int64_t i = 0; whole && i < n; ++i)
      convert(wrap(part({1, whole, h, w}, total), from + i * total * plane()),
              wrap(image(whole, type_of_number<Number>, i), to));
    if (!rest) return;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t y = 0; y < h; ++y) {
        Number* line = to + whole * rows() * w + (i * (h + 1) + y) * row;
        const float* source = from + (i * total + whole) * plane() + y * w;
        for (int64_t x = 0; x < w; ++x)
          for (int64_t k = 0; k < block; ++k) line[x * block + k] = k < rest ? source[k * plane() + x] : 0.f;
      }
  }

  // Copies the first `channels` to NCHW images, which have no others.
  template <class Number>
  void unpack(const Number* from, int64_t channels, float* to) const {
    const int64_t whole = channels / block * block, rest = channels - whole, row = w * block;
    for (int64_t i = 0; whole && i < n; ++i)
      convert(wrap(image(whole, type_of_number<Number>, i), from),
              wrap(part({1, whole, h, w}, channels), to + i * channels * plane()));
    if (!rest) return;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t y = 0; y < h; ++y) {
        const Number* line = from + whole * rows() * w + (i * (h + 1) + y) * row;
        float* target = to + (i * channels + whole) * plane() + y * w;
        for (int64_t k = 0; k < rest; ++k)
          for (int64_t x = 0; x < w; ++x) target[k * plane() + x] = to_float(line[x * block + k]);
      }
  }

  // Sets the rows after the images to zero.
  template <class Number>
  void clear_gaps(Number* data, int64_t channels) const {
    const int64_t row = w * block;
#pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < blocks(channels); ++k)
      for (int64_t i = 1; i <= n; ++i)
        std::memset(static_cast<void*>(data + (k * rows() + i * (h + 1) - 1) * row), 0, row * sizeof(Number));
  }
};

}  // namespace pwcnet
