// The tensors of the warping operators, on every device.
#pragma once

#include "abi.h"

namespace pwcnet {

constexpr TensorSpec kFeatures{"features", "float32", 4, {kN, kC, kH, kW}};
constexpr TensorSpec kFlow{"flow", "float32", 4, {kN, 2, kH, kW}};
constexpr TensorSpec kWarped{"warped", "float32", 4, {kN, kC, kH, kW}};
constexpr TensorSpec kGradient{"gradient", "float32", 4, {kN, kC, kH, kW}};
constexpr TensorSpec kFeatureGradient{"feature_gradient", "float32", 4, {kN, kC, kH, kW}};
constexpr TensorSpec kFlowGradient{"flow_gradient", "float32", 4, {kN, 2, kH, kW}};

}  // namespace pwcnet
