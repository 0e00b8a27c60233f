// The tensors of the cost volume's operators, on every device.
#pragma once

#include "abi.h"

namespace pwcnet {

constexpr TensorSpec kFeatures1{"features1", "float32", 4, {kN, kC, kH, kW}};
constexpr TensorSpec kFeatures2{"features2", "float32", 4, {kN, kC, kH, kW}};
constexpr TensorSpec kCosts{"costs", "float32", 4, {kN, kDisplacements, kH, kW}};
constexpr TensorSpec kGradient{"gradient", "float32", 4, {kN, kDisplacements, kH, kW}};
constexpr TensorSpec kGradient1{"gradient1", "float32", 4, {kN, kC, kH, kW}};
constexpr TensorSpec kGradient2{"gradient2", "float32", 4, {kN, kC, kH, kW}};

}  // namespace pwcnet
