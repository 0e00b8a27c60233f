// PWC-Net's operators for the CPU, as MindSpore's ahead-of-time custom operators.
//
// Each exported function has the signature of `ops.Custom(..., func_type="aot")`: `params` are the
// inputs, then the outputs, all contiguous NCHW float32; `shapes` are theirs. What they compute is
// said in model/operators.py and model/layers.py, which are the only ones to call them.
//
// One operator runs at a time: each uses all of OpenMP's threads, and they share scratch memory that
// is kept, since the system takes longer to hand out fresh pages than most operators take to run.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include <omp.h>
#include <sys/mman.h>

#ifdef WITH_ONEDNN
#include <dnnl.hpp>
#endif

namespace {

constexpr float kSlope = 0.1f;  // of LeakyReLU
constexpr int kLanes = 16;      // pixels handled together; the compiler maps them to what there is

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

inline Vector load(const float* at) { return *reinterpret_cast<const Vector*>(at); }
inline void store(float* at, Vector value) { *reinterpret_cast<Vector*>(at) = value; }

std::mutex one_at_a_time;

// Blocks of scratch memory, taken in the same order by each operator and never given back.
class Scratch {
 public:
  void restart() { next_ = 0; }

  void* take(size_t bytes) {
    if (next_ == blocks_.size()) blocks_.push_back({nullptr, 0});
    Block& block = blocks_[next_++];
    if (block.size < bytes) {
      std::free(block.data);
      constexpr size_t kHuge = size_t(1) << 21;
      block.size = (bytes + kHuge - 1) / kHuge * kHuge;
      block.data = std::aligned_alloc(kHuge, block.size);
      if (block.data == nullptr) {
        block.size = 0;
        throw std::bad_alloc();
      }
      madvise(block.data, block.size, MADV_HUGEPAGE);
    }
    return block.data;
  }

  float* floats(size_t count) { return static_cast<float*>(take(count * sizeof(float))); }

 private:
  struct Block {
    void* data;
    size_t size;
  };
  std::vector<Block> blocks_;
  size_t next_ = 0;
};

Scratch scratch;

// Runs an operator alone; an exception becomes the status that MindSpore reports.
template <class Function>
int run(const char* name, Function function) {
  std::lock_guard<std::mutex> lock(one_at_a_time);
  scratch.restart();
  try {
    function();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", name, error.what());
    return 1;
  }
}

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// ---- Cost volume --------------------------------------------------------------------------------

// Rows of an image with their channels side by side, (N, H, C, width), each row with `margin` zeros
// before it and enough behind it that a vector may be read anywhere: what an inner loop over channels
// or displacements reads lies close together.
struct Rows {
  float* data;
  int64_t h, c, width;
  const float* at(int64_t n, int64_t y, int64_t channel) const {
    return data + ((n * h + y) * c + channel) * width;
  }
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

Rows copy_rows(const float* source, const int64_t* shape, int64_t margin) {
  const int64_t w = shape[3];
  return make_rows(shape[0], shape[1], shape[2], w, margin, [=](float* row, int64_t offset) {
    std::memcpy(row, source + offset, w * sizeof(float));
  });
}

inline void store_part(float* at, Vector value, int64_t count) {
  if (count >= kLanes) {
    store(at, value);
  } else {
    float lanes[kLanes];
    store(lanes, value);
    std::memcpy(at, lanes, count * sizeof(float));
  }
}

template <int R>
void cost_volume(const float* features1, const float* features2, float* costs,
                 const int64_t* shape) {
  constexpr int kSide = 2 * R + 1;
  const int64_t n = shape[0], c = shape[1], h = shape[2], w = shape[3];
  const Rows rows1 = copy_rows(features1, shape, 0), rows2 = copy_rows(features2, shape, R);
  const float scale = 1.f / c;
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < n; ++i)
    for (int64_t y = 0; y < h; ++y)
      for (int dy = -R; dy <= R; ++dy)
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
          float* out = costs + ((i * kSide + dy + R) * kSide * h + y) * w + x;
          for (int dx = 0; dx < kSide; ++dx) {
            Vector cost = sums[dx] * scale;
            cost = cost > 0 ? cost : cost * kSlope;
            store_part(out + dx * h * w, cost, w - x);
          }
        }
}

template <int R>
void cost_volume_gradient(const float* features1, const float* features2, const float* costs,
                          const float* gradient, float* gradient1, float* gradient2,
                          const int64_t* shape) {
  constexpr int kSide = 2 * R + 1;
  constexpr int kGroup = 4;  // channels at a time, so that a gradient is read once for all of them
  const int64_t n = shape[0], c = shape[1], h = shape[2], w = shape[3];
  const Rows rows1 = copy_rows(features1, shape, R), rows2 = copy_rows(features2, shape, R);
  const float scale = 1.f / c;
  // The gradient of the sums of products: before LeakyReLU and the mean over channels.
  const Rows upstream =
      make_rows(n, kSide * kSide, h, w, R, [=](float* row, int64_t offset) {
        for (int64_t x = 0; x < w; ++x)
          row[x] = gradient[offset + x] * (costs[offset + x] > 0 ? scale : scale * kSlope);
      });
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < n; ++i)
    for (int64_t y = 0; y < h; ++y)
      for (int64_t first = 0; first < c; first += kGroup)
        for (int64_t x = 0; x < w; x += kLanes) {
          const int64_t group = std::min<int64_t>(kGroup, c - first);
          Vector sums1[kGroup] = {}, sums2[kGroup] = {};
          for (int dy = -R; dy <= R; ++dy) {
            if (y + dy >= 0 && y + dy < h) {
              // Pixel (y, x) of image 1 met (y + dy, x + dx) of image 2.
              const float* weights = upstream.at(i, y, (dy + R) * kSide) + x + R;
              const float* other = rows2.at(i, y + dy, first) + x;
#pragma GCC unroll 16
              for (int dx = 0; dx < kSide; ++dx) {
                const Vector weight = load(weights + dx * upstream.width);
                for (int64_t k = 0; k < group; ++k)
                  sums1[k] += weight * load(other + k * rows2.width + dx);
              }
            }
            if (y - dy >= 0 && y - dy < h) {
              // Pixel (y, x) of image 2 was met by (y - dy, x - dx) of image 1.
              const float* weights = upstream.at(i, y - dy, (dy + R) * kSide) + x + 2 * R;
              const float* other = rows1.at(i, y - dy, first) + x + 2 * R;
#pragma GCC unroll 16
              for (int dx = 0; dx < kSide; ++dx) {
                const Vector weight = load(weights + dx * upstream.width - dx);
                for (int64_t k = 0; k < group; ++k)
                  sums2[k] += weight * load(other + k * rows1.width - dx);
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

// ---- Warping ------------------------------------------------------------------------------------

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

void warp(const float* features, const float* flow, float* warped, const int64_t* shape) {
  const int64_t n = shape[0], c = shape[1], h = shape[2], w = shape[3];
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

void warp_gradient(const float* features, const float* flow, const float* gradient,
                   float* to_features, float* to_flow, const int64_t* shape) {
  const int64_t n = shape[0], c = shape[1], h = shape[2], w = shape[3];
  const Place* places = find_places(flow, n, h, w);
  // A thread has whole planes, so none adds to another's pixels.
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < c; ++k) {
      const float* upstream = gradient + (i * c + k) * h * w;
      float* plane = to_features + (i * c + k) * h * w;
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
      float* to_u = to_flow + (2 * i * h + y) * w;
      float* to_v = to_flow + ((2 * i + 1) * h + y) * w;
      std::fill(to_u, to_u + w, 0.f);
      std::fill(to_v, to_v + w, 0.f);
      for (int64_t k = 0; k < c; ++k) {
        const float* plane = features + (i * c + k) * h * w;
        const float* upstream = gradient + ((i * c + k) * h + y) * w;
        for (int64_t x = 0; x < w; ++x) {
          const Place& place = places[(i * h + y) * w + x];
          const Taps t = read_taps(plane, place, w);
          const float value = place.weight * upstream[x];
          const float across_top = t.top_right - t.top_left;
          const float across_bottom = t.bottom_right - t.bottom_left;
          to_u[x] += value * (across_top + place.b * (across_bottom - across_top));
          to_v[x] += value * (t.bottom_left - t.top_left + place.a * (across_bottom - across_top));
        }
      }
    }
}

// ---- Convolution to a flow ----------------------------------------------------------------------
//
// Two channels out of hundreds: a library's kernels compute sixteen and throw fourteen away. Without
// stride, dilation and activation.

constexpr int kFlow = 2, kTaps = 9;

// A row with a zero before it, and zeros behind it up to `width`.
void pad_row(const float* row, int64_t w, float* padded, int64_t width) {
  padded[0] = 0;
  std::memcpy(padded + 1, row, w * sizeof(float));
  std::fill(padded + 1 + w, padded + width, 0.f);
}

int64_t padded_width(int64_t w) { return round_up(w, kLanes) + kLanes; }

void convolve_to_flow(const float* x, const float* weight, const float* bias, float* flow,
                      const int64_t* shape) {
  const int64_t n = shape[0], c = shape[1], h = shape[2], w = shape[3], width = padded_width(w);
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < n; ++i)
    for (int64_t y = 0; y < h; ++y) {
      std::vector<float> padded(3 * width), sums(kFlow * width);
      for (int o = 0; o < kFlow; ++o) std::fill_n(sums.data() + o * width, width, bias[o]);
      for (int64_t k = 0; k < c; ++k) {
        for (int dy = 0; dy < 3; ++dy)
          if (y + dy - 1 >= 0 && y + dy - 1 < h)  // else it has stayed zero
            pad_row(x + ((i * c + k) * h + y + dy - 1) * w, w, padded.data() + dy * width, width);
        const float* taps = weight + k * kTaps;
        for (int64_t at = 0; at < w; at += kLanes) {
          Vector u = load(sums.data() + at), v = load(sums.data() + width + at);
#pragma GCC unroll 9
          for (int tap = 0; tap < kTaps; ++tap) {
            const Vector value = load(padded.data() + tap / 3 * width + at + tap % 3);
            u += taps[tap] * value;
            v += taps[c * kTaps + tap] * value;
          }
          store(sums.data() + at, u);
          store(sums.data() + width + at, v);
        }
      }
      for (int o = 0; o < kFlow; ++o)
        std::memcpy(flow + ((i * kFlow + o) * h + y) * w, sums.data() + o * width,
                    w * sizeof(float));
    }
}

void convolve_to_flow_gradient(const float* x, const float* weight, const float* gradient,
                               float* to_x, float* to_weight, float* to_bias,
                               const int64_t* shape) {
  const int64_t n = shape[0], c = shape[1], h = shape[2], w = shape[3], width = padded_width(w);
  // The gradient's rows, padded, with one of zeros above and below each image.
  float* rows = scratch.floats(n * kFlow * (h + 2) * width);
  const auto row = [=](int64_t i, int o, int64_t y) {
    return rows + ((i * kFlow + o) * (h + 2) + y + 1) * width;
  };
  for (int o = 0; o < kFlow; ++o) to_bias[o] = 0;
  for (int64_t i = 0; i < n; ++i)
    for (int o = 0; o < kFlow; ++o) {
      std::fill_n(row(i, o, -1), width, 0.f);
      std::fill_n(row(i, o, h), width, 0.f);
      const float* plane = gradient + (i * kFlow + o) * h * w;
      double sum = 0;
      for (int64_t p = 0; p < h * w; ++p) sum += plane[p];
      to_bias[o] += float(sum);
      for (int64_t y = 0; y < h; ++y) pad_row(plane + y * w, w, row(i, o, y), width);
    }
#pragma omp parallel for schedule(static)
  for (int64_t k = 0; k < c; ++k) {
    std::vector<float> line(width);
    Vector sums[kFlow][kTaps] = {};
    for (int64_t i = 0; i < n; ++i)
      for (int64_t y = 0; y < h; ++y) {
        // Pixel (y, x) of the input has met the outputs around it, by the taps opposite to them.
        const float* value = x + ((i * c + k) * h + y) * w;
        float* result = to_x + ((i * c + k) * h + y) * w;
        std::memcpy(line.data(), value, w * sizeof(float));
        std::fill(line.begin() + w, line.end(), 0.f);
        for (int64_t at = 0; at < w; at += kLanes) {
          const Vector here = load(line.data() + at);
          Vector back = {};
#pragma GCC unroll 2
          for (int o = 0; o < kFlow; ++o)
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
    for (int o = 0; o < kFlow; ++o)
      for (int tap = 0; tap < kTaps; ++tap) {
        float lanes[kLanes], sum = 0;
        store(lanes, sums[o][tap]);
        for (float lane : lanes) sum += lane;
        to_weight[(o * c + k) * kTaps + tap] = sum;
      }
  }
}

#ifdef WITH_ONEDNN
// ---- Convolution --------------------------------------------------------------------------------

using dnnl::memory;

struct Geometry {
  int64_t n, in, out, h, w, stride, dilation, leaky, concatenate;

  int64_t out_h() const { return (h - 1) / stride + 1; }
  int64_t out_w() const { return (w - 1) / stride + 1; }
  int64_t total_out() const { return out + (concatenate ? in : 0); }
  bool is_flow() const {
    return out == kFlow && stride == 1 && dilation == 1 && !leaky && !concatenate;
  }
  bool operator<(const Geometry& o) const {
    return std::tie(n, in, out, h, w, stride, dilation, leaky) <
           std::tie(o.n, o.in, o.out, o.h, o.w, o.stride, o.dilation, o.leaky);
  }
};

Geometry read_geometry(const int64_t* x, const int64_t* weight, const void* settings) {
  const int32_t* s = static_cast<const int32_t*>(settings);
  return {x[0], x[1], weight[0], x[2], x[3], s[0], s[1], s[2], s[3]};
}

dnnl::engine& engine() {
  static dnnl::engine the_engine(dnnl::engine::kind::cpu, 0);
  return the_engine;
}

dnnl::stream& stream() {
  static dnnl::stream the_stream(engine());
  return the_stream;
}

memory::desc plain(memory::dims dims) {
  const auto tag = dims.size() == 4 ? memory::format_tag::abcd : memory::format_tag::a;
  return memory::desc(dims, memory::data_type::f32, tag);
}

// NCHW images that are the first channels of images with `channels` of them.
memory::desc leading(memory::dims dims, int64_t channels) {
  const int64_t plane = dims[2] * dims[3];
  return memory::desc(dims, memory::data_type::f32,
                      memory::dims{channels * plane, plane, dims[3], 1});
}

// The three primitives of a convolution; oneDNN chooses the layouts that it is fastest in.
struct Convolution {
  dnnl::convolution_forward::primitive_desc forward;
  dnnl::convolution_backward_data::primitive_desc to_input;
  dnnl::convolution_backward_weights::primitive_desc to_weight;
  dnnl::primitive run_forward, run_to_input, run_to_weight;

  explicit Convolution(const Geometry& g) {
    const memory::dims x{g.n, g.in, g.h, g.w}, weight{g.out, g.in, 3, 3}, bias{g.out};
    const memory::dims y{g.n, g.out, g.out_h(), g.out_w()};
    const memory::dims stride{g.stride, g.stride}, pad{g.dilation, g.dilation};
    const memory::dims dilation{g.dilation - 1, g.dilation - 1};
    const auto any = [](const memory::dims& dims) {
      return memory::desc(dims, memory::data_type::f32, memory::format_tag::any);
    };
    dnnl::primitive_attr attributes, fused;  // a copy would be the same object
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    fused.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    if (g.leaky) {
      dnnl::post_ops after;
      after.append_eltwise(dnnl::algorithm::eltwise_relu, kSlope, 0.f);
      fused.set_post_ops(after);
    }
    const auto direct = dnnl::algorithm::convolution_direct;
    forward = {engine(), dnnl::prop_kind::forward_training, direct, any(x), any(weight),
               plain(bias), any(y), stride, dilation, pad, pad, fused};
    to_input = {engine(), direct, any(x), any(weight), any(y), stride, dilation, pad, pad,
                forward, attributes};
    to_weight = {engine(), direct, any(x), any(weight), plain(bias), any(y), stride, dilation,
                 pad, pad, forward, attributes};
    run_forward = dnnl::convolution_forward(forward);
    run_to_input = dnnl::convolution_backward_data(to_input);
    run_to_weight = dnnl::convolution_backward_weights(to_weight);
  }
};

Convolution& find_convolution(const Geometry& geometry) {
  static std::map<Geometry, Convolution> known;
  const auto found = known.find(geometry);
  return found != known.end() ? found->second
                              : known.emplace(geometry, Convolution(geometry)).first->second;
}

memory wrap(const memory::desc& desc, const void* data) {
  return memory(desc, engine(), const_cast<void*>(data));
}

memory allocate(const memory::desc& desc) { return wrap(desc, scratch.take(desc.get_size())); }

void convert(const memory& from, const memory& to, bool add = false) {
  dnnl::primitive_attr attributes;
  if (add) {
    dnnl::post_ops after;
    after.append_sum(1.f);
    attributes.set_post_ops(after);
  }
  dnnl::reorder(from, to, attributes).execute(stream(), const_cast<memory&>(from),
                                              const_cast<memory&>(to));
}

// The memory itself if its layout is the wanted one, else a copy in that layout.
memory in_layout(const memory& from, const memory::desc& wanted) {
  if (from.get_desc() == wanted) return from;
  memory to = allocate(wanted);
  convert(from, to);
  return to;
}

void execute(const dnnl::primitive& primitive, const memory::desc& scratchpad,
             std::unordered_map<int, memory> arguments) {
  arguments.insert({DNNL_ARG_SCRATCHPAD, allocate(scratchpad)});
  primitive.execute(stream(), arguments);
  stream().wait();
}

void copy_planes(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t n,
                 int64_t count) {
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t i = 0; i < n; ++i)
    for (int64_t part = 0; part < 64; ++part) {
      const int64_t begin = count * part / 64, end = count * (part + 1) / 64;
      std::memcpy(to + i * to_stride + begin, from + i * from_stride + begin,
                  (end - begin) * sizeof(float));
    }
}

void convolve(const Geometry& g, const float* x, const float* weight, const float* bias,
              float* out) {
  Convolution& convolution = find_convolution(g);
  const auto& chosen = convolution.forward;
  const memory::dims y{g.n, g.out, g.out_h(), g.out_w()};
  const memory source = in_layout(wrap(plain({g.n, g.in, g.h, g.w}), x), chosen.src_desc());
  const memory weights = in_layout(wrap(plain({g.out, g.in, 3, 3}), weight), chosen.weights_desc());
  const memory result = wrap(leading(y, g.total_out()), out);
  const bool directly = result.get_desc() == chosen.dst_desc();
  const memory computed = directly ? result : allocate(chosen.dst_desc());
  execute(convolution.run_forward, chosen.scratchpad_desc(),
          {{DNNL_ARG_SRC, source},
           {DNNL_ARG_WEIGHTS, weights},
           {DNNL_ARG_BIAS, wrap(plain({g.out}), bias)},
           {DNNL_ARG_DST, computed}});
  if (!directly) convert(computed, result);
  const int64_t plane = g.h * g.w;
  if (g.concatenate)
    copy_planes(x, g.in * plane, out + g.out * plane, g.total_out() * plane, g.n, g.in * plane);
}

void convolve_gradient(const Geometry& g, const float* x, const float* weight, const float* out,
                       const float* gradient, float* to_x, float* to_weight, float* to_bias) {
  Convolution& convolution = find_convolution(g);
  const memory::dims image{g.n, g.in, g.h, g.w}, weights{g.out, g.in, 3, 3};
  const memory::dims y{g.n, g.out, g.out_h(), g.out_w()};
  const int64_t plane = g.out_h() * g.out_w(), stride = g.total_out() * plane;

  memory upstream = wrap(leading(y, g.total_out()), gradient);
  if (g.leaky) {
    float* before = scratch.floats(g.n * g.out * plane);
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t i = 0; i < g.n; ++i)
      for (int64_t k = 0; k < g.out; ++k)
        for (int64_t p = 0; p < plane; ++p) {
          const int64_t at = i * stride + k * plane + p;
          before[(i * g.out + k) * plane + p] = gradient[at] * (out[at] > 0 ? 1.f : kSlope);
        }
    upstream = wrap(plain(y), before);
  }
  {
    const auto& chosen = convolution.to_weight;
    const memory source = in_layout(wrap(plain(image), x), chosen.src_desc());
    upstream = in_layout(upstream, chosen.diff_dst_desc());
    const memory result = wrap(plain(weights), to_weight);
    const bool directly = result.get_desc() == chosen.diff_weights_desc();
    const memory computed = directly ? result : allocate(chosen.diff_weights_desc());
    execute(convolution.run_to_weight, chosen.scratchpad_desc(),
            {{DNNL_ARG_SRC, source},
             {DNNL_ARG_DIFF_DST, upstream},
             {DNNL_ARG_DIFF_WEIGHTS, computed},
             {DNNL_ARG_DIFF_BIAS, wrap(plain({g.out}), to_bias)}});
    if (!directly) convert(computed, result);
  }
  const auto& chosen = convolution.to_input;
  const memory weights_there = in_layout(wrap(plain(weights), weight), chosen.weights_desc());
  const memory result = wrap(plain(image), to_x);
  const bool directly = !g.concatenate && result.get_desc() == chosen.diff_src_desc();
  const memory computed = directly ? result : allocate(chosen.diff_src_desc());
  execute(convolution.run_to_input, chosen.scratchpad_desc(),
          {{DNNL_ARG_DIFF_DST, in_layout(upstream, chosen.diff_dst_desc())},
           {DNNL_ARG_WEIGHTS, weights_there},
           {DNNL_ARG_DIFF_SRC, computed}});
  if (g.concatenate)  // the input went on as it was, too
    copy_planes(gradient + g.out * plane, stride, to_x, g.in * plane, g.n, g.in * plane);
  if (!directly) convert(computed, result, g.concatenate);
}
#endif  // WITH_ONEDNN

const float* in(void** params, int i) { return static_cast<const float*>(params[i]); }
float* out(void** params, int i) { return static_cast<float*>(params[i]); }

}  // namespace

#define OPERATOR(name)                                                                        \
  extern "C" int name(int, void** params, int*, int64_t** shapes, const char**, void*, void*)

// features1, features2 -> costs after LeakyReLU
OPERATOR(CostVolume) {
  return run("CostVolume", [=] {
    cost_volume<4>(in(params, 0), in(params, 1), out(params, 2), shapes[0]);
  });
}

// features1, features2, costs, gradient -> gradient1, gradient2
OPERATOR(CostVolumeGradient) {
  return run("CostVolumeGradient", [=] {
    cost_volume_gradient<4>(in(params, 0), in(params, 1), in(params, 2), in(params, 3),
                            out(params, 4), out(params, 5), shapes[0]);
  });
}

// features, flow -> warped
OPERATOR(Warp) {
  return run("Warp", [=] { warp(in(params, 0), in(params, 1), out(params, 2), shapes[0]); });
}

// features, flow, gradient -> to features, to flow
OPERATOR(WarpGradient) {
  return run("WarpGradient", [=] {
    warp_gradient(in(params, 0), in(params, 1), in(params, 2), out(params, 3), out(params, 4),
                  shapes[0]);
  });
}

#ifdef WITH_ONEDNN
// x, weight, bias, settings (int32: stride, dilation, LeakyReLU, concatenate) -> y
OPERATOR(Convolution3x3) {
  return run("Convolution3x3", [=] {
    const Geometry geometry = read_geometry(shapes[0], shapes[1], params[3]);
    if (geometry.is_flow())
      convolve_to_flow(in(params, 0), in(params, 1), in(params, 2), out(params, 4), shapes[0]);
    else
      convolve(geometry, in(params, 0), in(params, 1), in(params, 2), out(params, 4));
  });
}

// x, weight, y, gradient, settings -> to x, to weight, to bias
OPERATOR(Convolution3x3Gradient) {
  return run("Convolution3x3Gradient", [=] {
    const Geometry geometry = read_geometry(shapes[0], shapes[1], params[4]);
    if (geometry.is_flow())
      convolve_to_flow_gradient(in(params, 0), in(params, 1), in(params, 3), out(params, 5),
                                out(params, 6), out(params, 7), shapes[0]);
    else
      convolve_gradient(geometry, in(params, 0), in(params, 1), in(params, 2), in(params, 3),
                        out(params, 5), out(params, 6), out(params, 7));
  });
}
#endif
