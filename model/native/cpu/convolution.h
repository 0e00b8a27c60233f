// The oneDNN primitives of a 3x3 convolution with bias and LeakyReLU, made when they are first needed and then kept.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "bfloat16.h"
#include "onednn.h"

namespace pwcnet {

// What happens to the sums of a convolution.
enum After : int64_t {
  kNothing,  // they get a bias
  kLeaky,    // they get a bias and LeakyReLU
  kAdd,      // they are added, without a bias, to what is at their place, in float32
};

struct Geometry {
  int64_t n = 0, in = 0, out = 0, h = 0, w = 0, stride = 1, dilation = 1;
  After after = kNothing;
  // The layout of images: blocks of so many channels, or whatever is fastest if it is 0.
  int64_t block = 0;
  // Whether images, weights and upstream gradients are rounded to bfloat16. Products are summed in float32.
  bool bfloat16 = false;
  // Whether the gradient of x, and y, are rounded to bfloat16.
  bool bfloat16_x = false, bfloat16_y = false;

  Geometry() = default;
  // Only the sizes: everything else is set by its name, so that no flag can be taken for another.
  Geometry(int64_t n, int64_t in, int64_t out, int64_t h, int64_t w) : n(n), in(in), out(out), h(h), w(w) {}

  int64_t out_h() const { return (h - 1) / stride + 1; }
  int64_t out_w() const { return (w - 1) / stride + 1; }
  memory::dims x() const { return {n, in, h, w}; }
  memory::dims y() const { return {n, out, out_h(), out_w()}; }
  memory::data_type type() const { return type_of(bfloat16); }
  memory::data_type x_gradient_type() const { return type_of(bfloat16_x); }
  memory::data_type y_type() const { return type_of(bfloat16_y); }
  auto fields() const {
    return std::tie(n, in, out, h, w, stride, dilation, after, bfloat16, block, bfloat16_x, bfloat16_y);
  }
  bool operator<(const Geometry& o) const { return fields() < o.fields(); }

  static memory::data_type type_of(bool bfloat16) {
    return bfloat16 ? memory::data_type::bf16 : memory::data_type::f32;
  }
};

class Convolution {
 public:
  template <class Description>
  struct Step {
    Description chosen;  // the layouts
    dnnl::primitive run;
  };
  using Forward = Step<dnnl::convolution_forward::primitive_desc>;
  using InputGradient = Step<dnnl::convolution_backward_data::primitive_desc>;
  using WeightGradient = Step<dnnl::convolution_backward_weights::primitive_desc>;

  explicit Convolution(const Geometry& g)
      : x_(g.x()),
        weight_{g.out, g.in, 3, 3},
        y_(g.y()),
        stride_{g.stride, g.stride},
        dilation_{g.dilation - 1, g.dilation - 1},
        pad_{g.dilation, g.dilation},
        after_(g.after),
        type_(g.type()),
        x_gradient_type_(g.x_gradient_type()),
        y_type_(g.y_type()),
        tag_(g.block == 16  ? memory::format_tag::aBcd16b
             : g.block == 8 ? memory::format_tag::aBcd8b
                            : memory::format_tag::any) {}

  const Forward& forward() {
    if (!forward_) {
      const auto chosen = describe_forward();
      forward_ = Forward{chosen, dnnl::convolution_forward(chosen)};
    }
    return *forward_;
  }

  const InputGradient& input_gradient() {
    if (!input_gradient_) {
      const dnnl::convolution_backward_data::primitive_desc chosen(
          engine(), kDirect, images(x_, x_gradient_type_), weights(type_), images(y_, type_), stride_, dilation_, pad_,
          pad_, describe_forward(), attributes(kNothing));
      input_gradient_ = InputGradient{chosen, dnnl::convolution_backward_data(chosen)};
    }
    return *input_gradient_;
  }

  const WeightGradient& weight_gradient() {
    if (!weight_gradient_) {
      const dnnl::convolution_backward_weights::primitive_desc chosen(
          engine(), kDirect, images(x_, type_), weights(memory::data_type::f32), plain({weight_[0]}), images(y_, type_),
          stride_, dilation_, pad_, pad_, describe_forward(), attributes(kNothing));
      weight_gradient_ = WeightGradient{chosen, dnnl::convolution_backward_weights(chosen)};
    }
    return *weight_gradient_;
  }

 private:
  static constexpr auto kDirect = dnnl::algorithm::convolution_direct;

  memory::desc images(const memory::dims& dims, memory::data_type type) const { return {dims, type, tag_}; }
  memory::desc weights(memory::data_type type) const { return {weight_, type, memory::format_tag::any}; }

  static dnnl::primitive_attr attributes(After after) {
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    dnnl::post_ops operations;
    if (after == kLeaky) operations.append_eltwise(dnnl::algorithm::eltwise_relu, kLeakySlope, 0.f);
    if (after == kAdd) operations.append_sum(1.f);
    attributes.set_post_ops(operations);
    return attributes;
  }

  dnnl::convolution_forward::primitive_desc describe_forward() const {
    const auto training = dnnl::prop_kind::forward_training;
    const auto bias = after_ == kAdd ? memory::desc() : plain({weight_[0]});
    return {engine(),  training, kDirect, images(x_, type_), weights(type_), bias, images(y_, y_type_), stride_,
            dilation_, pad_,     pad_,    attributes(after_)};
  }

  memory::dims x_, weight_, y_, stride_, dilation_, pad_;
  After after_;
  memory::data_type type_, x_gradient_type_, y_type_;
  memory::format_tag tag_;
  std::optional<Forward> forward_;
  std::optional<InputGradient> input_gradient_;
  std::optional<WeightGradient> weight_gradient_;
};

inline Convolution& find_convolution(const Geometry& geometry) {
  static Cache<Geometry, Convolution> cache;
  return cache.find(geometry);
}

// The gradient before LeakyReLU, from its result and the gradient of that.
template <class Number, class Upstream>
void differentiate_leaky(const Number* result, const Upstream* upstream, Number* before, int64_t count) {
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) {
    const Vector gradient = load(upstream + at);
    store(before + at, load(result + at) > 0 ? gradient : gradient * kLeakySlope);
  }
  for (; at < count; ++at) before[at] = to_float(upstream[at]) * (to_float(result[at]) > 0 ? 1.f : kLeakySlope);
}

// The gradient of a convolution without stride is one, too, with turned weights. Turns the weights (out, in, 3, 3) for
// `count` of its inputs from `first` on: (count, out, 3, 3), which are part of weights of `total` inputs.
inline void turn_weights(const float* weight, int64_t out, int64_t in, int64_t first, int64_t count, float* turned,
                         int64_t total) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; ++i)
    for (int64_t o = 0; o < out; ++o) {
      const float* from = weight + (o * in + first + i) * kTaps;
      std::reverse_copy(from, from + kTaps, turned + (i * total + o) * kTaps);
    }
}

}  // namespace pwcnet
