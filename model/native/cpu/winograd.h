// The 3x3 convolution without stride by Winograd's minimal filtering, from blocked images to blocked images.
#pragma once

#include <cstdint>

#include "convolution.h"

namespace pwcnet {

// Images in blocks of kLanes channels. A block is an image's pixels, row by row, of kLanes numbers each.
template <class Number>
struct BlockedImages {
  Number* data;
  int64_t image, block;  // distances between images, and between the blocks of one, in numbers
};

// Whether `convolve_by_winograd` computes this convolution; it is then faster than oneDNN.
bool suits_winograd(const Geometry& g);

// x, weight (out, in, 3, 3), bias (out, or null for zeros) -> y. In x, the channels that fill up the last block must be
// zero; in y they become zero (with kAdd, they stay). Multiplies numbers of the type of x, and sums in float32.
template <class Number, class Result>
void convolve_by_winograd(const Geometry& g, const BlockedImages<const Number>& x, const float* weight,
                          const float* bias, const BlockedImages<Result>& y);

// x and the gradient of y before its activation -> gradients of weight and bias
template <class Number>
void differentiate_weights_by_winograd(const Geometry& g, const BlockedImages<const Number>& x,
                                       const BlockedImages<const Number>& upstream, float* weight_gradient,
                                       float* bias_gradient);

}  // namespace pwcnet
