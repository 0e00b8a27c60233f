// What PWC-Net's operators have in common on every device.
#pragma once

#include <cstdint>

namespace pwcnet {

constexpr float kLeakySlope = 0.1f;             // of LeakyReLU
constexpr int kSearchRange = 4;                 // of the cost volume, in pixels in each direction
constexpr int kSide = 2 * kSearchRange + 1;     // displacements along one axis
constexpr int kDisplacements = kSide * kSide;   // channels of the cost volume
constexpr int64_t kMaxPixels = INT32_MAX - 16;  // of one image: kernels count its pixels, a tile more, in an int

}  // namespace pwcnet
