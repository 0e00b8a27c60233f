// The 3x3 convolution that gives a flow: kFlowChannels channels, without stride, dilation and activation.
#pragma once

#include <cstdint>

#include "convolution.h"
#include "winograd.h"

namespace pwcnet {

constexpr int kFlowChannels = 2;

// x in blocks of kBlock channels, weight (2, C, 3, 3), bias (2) -> flow (N, 2, H, W). Weights are not rounded.
template <int kBlock, class Number>
void convolve_to_flow(const Geometry& g, const BlockedImages<const Number>& x, const float* weight, const float* bias,
                      float* flow);

// x, gradient of the flow -> gradients of weight and bias
template <int kBlock, class Number>
void differentiate_flow_weights(const Geometry& g, const BlockedImages<const Number>& x, const float* gradient,
                                float* weight_gradient, float* bias_gradient);

// weight, gradient of the flow -> gradient of `count` channels of x from `first` on, which is a multiple of kBlock.
// What `others` has is added to it; null if there is nothing.
template <int kBlock, class Number, class Result>
void differentiate_flow_input(const Geometry& g, const float* weight, const float* gradient, int64_t first,
                              int64_t count, const BlockedImages<const Number>& others,
                              const BlockedImages<Result>& x_gradient);

}  // namespace pwcnet
