// The 3x3 convolution that gives a flow: kFlowChannels channels, without stride, dilation and activation.
#pragma once

#include "../abi.h"

namespace pwcnet {

constexpr int kFlowChannels = 2;

// x (N, C, H, W), weight (2, C, 3, 3), bias (2) -> flow (N, 2, H, W)
void convolve_to_flow(const float* x, const float* weight, const float* bias, float* flow, const Sizes& sizes);

// x, weight, gradient of the flow -> gradients of x, weight and bias
void convolve_to_flow_gradient(const float* x, const float* weight, const float* gradient, float* x_gradient,
                               float* weight_gradient, float* bias_gradient, const Sizes& sizes);

}  // namespace pwcnet
