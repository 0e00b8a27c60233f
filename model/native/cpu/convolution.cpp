// The 3x3 convolution with bias and LeakyReLU on the CPU, and its gradient: by oneDNN in the layouts that it is fastest
// in, or by Winograd's filtering.
//
// Defined by `Convolution` in model/layers.py.

#include "convolution.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "../abi.h"
#include "bfloat16.h"
#include "flow_convolution.h"
#include "onednn.h"
#include "tall.h"
#include "winograd.h"

namespace pwcnet {
namespace {

// Images, (N, C, H, W), are float32 tensors with four axes; or tensors with five in blocked layout, (N, C / kLanes
// rounded up, H, W, kLanes), in the type that the convolution multiplies; or, if they are read, the features of a flow
// estimator (tall.h), with six. The channels that fill up the last block are zero.
int rank_of(const Call& call, int i) { return i < call.count ? call.ranks[i] : 0; }
bool is_bfloat16(const Call& call, int i) { return rank_of(call, i) > 4 && !std::strcmp(call.dtypes[i], "bfloat16"); }
const char* type_name(const Call& call, int i) { return is_bfloat16(call, i) ? "bfloat16" : "float32"; }

// The specification of `name`, which has the axes and the type of the call's tensor `i`.
TensorSpec input_spec(const Call& call, int i, const char* name) {
  if (rank_of(call, i) == 6) {
    const int64_t *shape = call.shapes[i], block = shape[5] == 8 ? 8 : kLanes;
    return {name, type_name(call, i), 6, {1, kBlocks, kN, kRows, kW, block}};
  }
  if (rank_of(call, i) == 5) return {name, type_name(call, i), 5, {kN, kBlocks, kH, kW, kLanes}};
  return {name, "float32", 4, {kN, kC, kH, kW}};
}

TensorSpec result_spec(const Call& call, int i, const char* name) {
  if (rank_of(call, i) == 5) return {name, type_name(call, i), 5, {kN, kOutBlocks, kOutH, kOutW, kLanes}};
  return {name, "float32", 4, {kN, kOut, kOutH, kOutW}};
}

// The tensor `i` of a call.
struct Images {
  memory::dims dims;  // N, C, H, W
  void* data;
  int rank;
  memory::data_type type;
  int64_t block;  // with six axes

  Images(const Call& call, int i, const memory::dims& dims)
      : dims(dims),
        data(call.params[i]),
        rank(call.ranks[i]),
        type(is_bfloat16(call, i) ? memory::data_type::bf16 : memory::data_type::f32),
        block(rank == 6 ? call.shapes[i][5] : kLanes) {}

  Status check(const Call& call, int i, const char* name) const {
    const int64_t n = dims[0], c = dims[1], h = dims[2], w = dims[3], blocks = round_up(c, block) / block;
    const std::vector<int64_t> expected = rank == 6   ? std::vector<int64_t>{1, blocks, n, h + 1, w, block}
                                          : rank == 5 ? std::vector<int64_t>{n, blocks, h, w, block}
                                                      : std::vector<int64_t>{n, c, h, w};
    if (std::equal(expected.begin(), expected.end(), call.shapes[i])) return kOk;
    return fail_shape(call, name, call.shapes[i], rank, expected.data(), rank);
  }

  // How oneDNN describes images with four or five axes.
  memory::desc desc() const { return {dims, type, rank == 5 ? memory::format_tag::aBcd16b : memory::format_tag::abcd}; }
  TallLayout tall() const { return {dims[0], dims[2], dims[3], block}; }
  // Whether kernels for blocks of kLanes channels of this type can use features as they are.
  bool is_tall_in(memory::data_type wanted) const { return rank == 6 && block == kLanes && type == wanted; }
};

// Images as oneDNN describes them; features are copied.
memory as_memory(const Images& x) {
  if (x.rank < 6) return wrap(x.desc(), x.data);
  const memory copy = allocate(plain(x.dims));
  with_number(x.type == memory::data_type::bf16, [&](auto number) {
    const auto* features = static_cast<const decltype(number)*>(x.data);
    x.tall().unpack(features, x.dims[1], static_cast<float*>(copy.get_data_handle()));
  });
  return copy;
}

// Calls `write` with memory of a layout, and converts what it wrote unless the images have that layout.
template <class Function>
void write_images(const Images& y, const memory::desc& layout, Function write) {
  if (y.rank < 6) {
    write_in_layout(wrap(y.desc(), y.data), layout, write);
    return;
  }
  const memory copy = allocate(plain(y.dims));
  write_in_layout(copy, layout, write);
  with_number(y.type == memory::data_type::bf16, [&](auto number) {
    auto* features = static_cast<decltype(number)*>(y.data);
    y.tall().pack(static_cast<const float*>(copy.get_data_handle()), y.dims[1], y.dims[1], features);
  });
}

memory::desc in_blocks(const memory::dims& dims, memory::data_type type) {
  return {dims, type, memory::format_tag::aBcd16b};
}

template <class Number>
BlockedImages<Number> blocks_of(const memory& found) {
  const memory::dims dims = found.get_desc().get_dims();
  const int64_t plane = dims[2] * dims[3];
  return {static_cast<Number*>(found.get_data_handle()), round_up(dims[1], kLanes) * plane, kLanes * plane};
}

// Images in blocks, for reading.
template <class Number>
BlockedImages<const Number> read_blocks(const Images& x) {
  constexpr auto type = type_of_number<Number>;
  if (x.is_tall_in(type)) return x.tall().images(static_cast<const Number*>(x.data));
  return blocks_of<const Number>(in_layout(as_memory(x), in_blocks(x.dims, type)));
}

// Calls `write` with images in blocks for their result, which it writes.
template <class Number, class Function>
void write_blocks(const Images& y, Function write) {
  constexpr auto type = type_of_number<Number>;
  if (y.is_tall_in(type)) {
    write(y.tall().images(static_cast<Number*>(y.data)));
  } else {
    write_images(y, in_blocks(y.dims, type), [&](const memory& computed) { write(blocks_of<Number>(computed)); });
  }
}

// Whether flow_convolution.h computes this.
bool is_flow(const Geometry& g, const Images& x, const Images& y) {
  return g.out == kFlowChannels && g.stride == 1 && g.dilation == 1 && g.after == kNothing && x.rank < 6 && y.rank == 4;
}

// Reads a call's settings, and checks that the shapes of its input `x` and output `y` follow from them.
Status read_geometry(const Call& call, const Sizes& sizes, const int32_t* settings, int x, int y, Geometry* geometry) {
  const int64_t height = rank_of(call, x) == 6 ? sizes[kRows] - 1 : sizes[kH];
  Geometry g(sizes[kN], sizes[kC], sizes[kOut], height, sizes[kW]);
  g.stride = settings[0];
  g.dilation = settings[1];
  g.after = settings[2] ? kLeaky : kNothing;
  g.bfloat16 = settings[3];
  g.bfloat16_x = is_bfloat16(call, x);
  g.bfloat16_y = is_bfloat16(call, y);
  if (g.stride < 1 || g.dilation < 1) {
    std::fprintf(stderr, "%s: stride is %d and dilation %d, expected 1 or more\n", call.name, settings[0], settings[1]);
    return kShape;
  }
  if (!g.bfloat16 && (g.bfloat16_x || g.bfloat16_y)) {
    std::fprintf(stderr, "%s: x or y is bfloat16, expected float32, as the settings say\n", call.name);
    return kDtype;
  }
  *geometry = g;
  if (const Status status = Images(call, x, g.x()).check(call, x, "x")) return status;
  return Images(call, y, g.y()).check(call, y, "y");
}

// Convolves images by Winograd's filtering.
template <class Number>
void convolve_by_winograd(const Geometry& g, const BlockedImages<const Number>& x, const float* weight,
                          const float* bias, const Images& y) {
  if (g.bfloat16_y) {
    if constexpr (sizeof(Number) == sizeof(Bfloat16))
      write_blocks<Bfloat16>(y, [&](const auto& result) { convolve_by_winograd(g, x, weight, bias, result); });
  } else {
    write_blocks<float>(y, [&](const auto& result) { convolve_by_winograd(g, x, weight, bias, result); });
  }
}

void convolve(const Geometry& g, const Images& x, const float* weight, const float* bias, const Images& y) {
  if (suits_winograd(g)) {
    with_number(g.bfloat16,
                [&](auto number) { convolve_by_winograd(g, read_blocks<decltype(number)>(x), weight, bias, y); });
    return;
  }
  const auto& step = find_convolution(g).forward();
  const memory source = in_layout(as_memory(x), step.chosen.src_desc());
  const memory weights = in_layout(wrap(plain({g.out, g.in, 3, 3}), weight), step.chosen.weights_desc());
  write_images(y, step.chosen.dst_desc(), [&](const memory& computed) {
    execute(step.run, step.chosen.scratchpad_desc(),
            {{DNNL_ARG_SRC, source},
             {DNNL_ARG_WEIGHTS, weights},
             {DNNL_ARG_BIAS, wrap(plain({g.out}), bias)},
             {DNNL_ARG_DST, computed}});
  });
}

// The gradient before LeakyReLU in scratch memory, in the layout of the gradient after it.
template <class Number>
memory gradient_before_activation(const memory& y, const memory& upstream) {
  constexpr int64_t kPart = 4096;
  const memory before = allocate(upstream.get_desc());
  const int64_t count = upstream.get_desc().get_size() / sizeof(Number);
  const auto *result = static_cast<const Number*>(y.get_data_handle()),
             *gradient = static_cast<const Number*>(upstream.get_data_handle());
  auto* product = static_cast<Number*>(before.get_data_handle());
#pragma omp parallel for schedule(static)
  for (int64_t at = 0; at < count; at += kPart)
    differentiate_leaky(result + at, gradient + at, product + at, std::min(kPart, count - at));
  return before;
}

// The gradients of weight and bias. Leaves `upstream` in the layout that it was needed in.
void differentiate_weights(const Geometry& g, const Images& x, memory* upstream, float* weight_gradient,
                           float* bias_gradient) {
  if (suits_winograd(g)) {
    *upstream = in_layout(*upstream, in_blocks(g.y(), g.type()));
    with_number(g.bfloat16, [&](auto number) {
      using Number = decltype(number);
      differentiate_weights_by_winograd(g, read_blocks<Number>(x), blocks_of<const Number>(*upstream), weight_gradient,
                                        bias_gradient);
    });
    return;
  }
  const auto& step = find_convolution(g).weight_gradient();
  const memory source = in_layout(as_memory(x), step.chosen.src_desc());
  *upstream = in_layout(*upstream, step.chosen.diff_dst_desc());
  const memory result = wrap(plain({g.out, g.in, 3, 3}), weight_gradient);
  write_in_layout(result, step.chosen.diff_weights_desc(), [&](const memory& computed) {
    execute(step.run, step.chosen.scratchpad_desc(),
            {{DNNL_ARG_SRC, source},
             {DNNL_ARG_DIFF_DST, *upstream},
             {DNNL_ARG_DIFF_WEIGHTS, computed},
             {DNNL_ARG_DIFF_BIAS, wrap(plain({g.out}), bias_gradient)}});
  });
}

void differentiate_input(const Geometry& g, const memory& upstream, const float* weight, const Images& x_gradient) {
  Geometry turned(g.n, g.out, g.in, g.h, g.w);
  turned.stride = g.stride;
  turned.dilation = g.dilation;
  turned.bfloat16 = g.bfloat16;
  turned.bfloat16_y = g.bfloat16_x;
  if (suits_winograd(turned)) {
    float* turned_weight = scratch.floats(g.in * g.out * kTaps);
    turn_weights(weight, g.out, g.in, 0, g.in, turned_weight, g.out);
    const memory source = in_layout(upstream, in_blocks(g.y(), g.type()));
    with_number(g.bfloat16, [&](auto number) {
      convolve_by_winograd(turned, blocks_of<const decltype(number)>(source), turned_weight, nullptr, x_gradient);
    });
    return;
  }
  const auto& step = find_convolution(g).input_gradient();
  const memory weights = in_layout(wrap(plain({g.out, g.in, 3, 3}), weight), step.chosen.weights_desc());
  const memory source = in_layout(upstream, step.chosen.diff_dst_desc());
  write_images(x_gradient, step.chosen.diff_src_desc(), [&](const memory& computed) {
    execute(step.run, step.chosen.scratchpad_desc(),
            {{DNNL_ARG_DIFF_DST, source}, {DNNL_ARG_WEIGHTS, weights}, {DNNL_ARG_DIFF_SRC, computed}});
  });
}

// The convolution that gives a flow, of images in blocks of either type.
template <class Number>
void differentiate_flow(const Geometry& g, const Images& x, const float* weight, const float* upstream,
                        float* weight_gradient, float* bias_gradient, const std::optional<Images>& x_gradient) {
  differentiate_flow_weights<kLanes>(g, read_blocks<Number>(x), upstream, weight_gradient, bias_gradient);
  if (!x_gradient) return;
  write_blocks<Number>(*x_gradient, [&](const BlockedImages<Number>& result) {
    differentiate_flow_input<kLanes>(g, weight, upstream, 0, g.in, BlockedImages<const Number>{}, result);
  });
}

constexpr TensorSpec kWeight{"weight", "float32", 4, {kOut, kC, 3, 3}};
constexpr TensorSpec kBias{"bias", "float32", 1, {kOut}};
constexpr TensorSpec kSettings{"settings", "int32", 1, {4}};
constexpr TensorSpec kWeightGradient{"weight_gradient", "float32", 4, {kOut, kC, 3, 3}};
constexpr TensorSpec kBiasGradient{"bias_gradient", "float32", 1, {kOut}};

}  // namespace

// Whether the processor multiplies bfloat16 numbers; oneDNN would imitate that otherwise.
extern "C" int has_bfloat16() { return has_isa(dnnl::cpu_isa::avx512_core_bf16); }

// Floating-point operations in a second of a convolution that is large, has many channels, and fits into the caches.
// One image keeps one thread busy; four are enough for many.
extern "C" double measure_peak(int bfloat16) {
  std::lock_guard<std::mutex> lock(operator_mutex);
  scratch.restart();
  Geometry g(std::min(omp_get_max_threads(), 4), 256, 256, 48, 56);
  g.bfloat16 = bfloat16;
  const auto& [chosen, primitive] = find_convolution(g).forward();
  const auto zeros = [](const memory::desc& desc) {
    const memory found = allocate(desc);
    std::memset(found.get_data_handle(), 0, desc.get_size());
    return found;
  };
  const std::unordered_map<int, memory> arguments = {{DNNL_ARG_SRC, zeros(chosen.src_desc())},
                                                     {DNNL_ARG_WEIGHTS, zeros(chosen.weights_desc())},
                                                     {DNNL_ARG_BIAS, zeros(plain({g.out}))},
                                                     {DNNL_ARG_DST, zeros(chosen.dst_desc())}};
  double fastest = 1e9;
  for (int repeat = 0; repeat < 8; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    execute(primitive, chosen.scratchpad_desc(), arguments);
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    fastest = std::min(fastest, taken.count());
  }
  return 2.0 * g.n * g.h * g.w * g.in * g.out * 9 / fastest;
}

// x, weight, bias, settings (stride, dilation, LeakyReLU, bfloat16) -> y
PWCNET_OPERATOR(Convolution3x3) {
  return run(call, {input_spec(call, 0, "x"), kWeight, kBias, kSettings, result_spec(call, 4, "y")},
             [&](const Sizes& sizes) {
               const float *weight = call.data<float>(1), *bias = call.data<float>(2);
               Geometry g;
               if (const Status status = read_geometry(call, sizes, call.data<int32_t>(3), 0, 4, &g)) return status;
               const Images x(call, 0, g.x()), y(call, 4, g.y());
               if (!is_flow(g, x, y)) {
                 convolve(g, x, weight, bias, y);
                 return kOk;
               }
               with_number(g.bfloat16_x, [&](auto number) {
                 convolve_to_flow<kLanes>(g, read_blocks<decltype(number)>(x), weight, bias, call.data<float>(4));
               });
               return kOk;
             });
}

// The convolution of an image, whose gradient is seldom needed.
PWCNET_OPERATOR_ALIAS(ImageConvolution3x3, Convolution3x3)

// x, weight, y, gradient of y, settings -> gradients of weight, bias and, if there is a tensor for it, x
PWCNET_OPERATOR(Convolution3x3Gradient) {
  std::vector<TensorSpec> specs = {
      input_spec(call, 0, "x"), kWeight,      result_spec(call, 2, "y"), result_spec(call, 2, "gradient"), kSettings,
      kWeightGradient,          kBiasGradient};
  if (call.count > 7) specs.push_back(input_spec(call, 0, "x_gradient"));
  return run(call, specs, [&](const Sizes& sizes) {
    const float *weight = call.data<float>(1), *flow_gradient = call.data<float>(3);
    float *weight_gradient = call.data<float>(5), *bias_gradient = call.data<float>(6);
    Geometry g;
    if (const Status status = read_geometry(call, sizes, call.data<int32_t>(4), 0, 2, &g)) return status;
    const Images x(call, 0, g.x()), y(call, 2, g.y()), gradient(call, 3, g.y());
    std::optional<Images> x_gradient;
    if (call.count > 7) x_gradient.emplace(call, 7, g.x());
    if (is_flow(g, x, y)) {
      with_number(g.bfloat16_x, [&](auto number) {
        using Number = decltype(number);
        differentiate_flow<Number>(g, x, weight, flow_gradient, weight_gradient, bias_gradient, x_gradient);
      });
      return kOk;
    }
    memory upstream = as_memory(gradient);
    if (g.after == kLeaky)
      with_number(g.bfloat16_y, [&](auto number) {
        upstream = gradient_before_activation<decltype(number)>(as_memory(y), upstream);
      });
    differentiate_weights(g, x, &upstream, weight_gradient, bias_gradient);
    if (x_gradient) differentiate_input(g, upstream, weight, *x_gradient);
    return kOk;
  });
}

}  // namespace pwcnet
