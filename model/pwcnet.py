"""PWC-Net: feature pyramid, warping, cost volume, flow estimators and context network.

D. Sun, X. Yang, M.-Y. Liu, J. Kautz, "PWC-Net: CNNs for Optical Flow Using Pyramid, Warping, and
Cost Volume", CVPR 2018, in the variant of J. Hur and S. Roth, "Iterative Residual Refinement for
Joint Optical Flow and Occlusion Estimation", CVPR 2019: two convolutions a pyramid level, bilinear
upsampling between levels, dense estimators.
"""

import numpy as np
from mindspore import Tensor, float32, nn, ops

from model.layers import conv
from model.ops import SEARCH_RANGE, cost_volume, warp

PYRAMID_CHANNELS = (3, 16, 32, 64, 96, 128, 196)
ESTIMATOR_CHANNELS = (128, 128, 96, 64, 32)
CONTEXT_LAYERS = ((128, 1), (128, 2), (128, 4), (96, 8), (64, 16), (32, 1))  # channels, dilation
OUTPUT_LEVELS = 5  # of the six pyramid levels, from the coarsest: the last is quarter resolution
DIV_FLOW = 0.05
"""The network's flow is full-resolution pixels times this, at every level."""
SIZE_MULTIPLE = 2 ** (len(PYRAMID_CHANNELS) - 1)
"""Image sides must be multiples of this many pixels."""


class FeaturePyramid(nn.Cell):
    """Features of one image at halved resolutions, two convolutions each."""

    def __init__(self):
        super().__init__()
        self.convs = nn.CellList([
            nn.SequentialCell(conv(channels_in, channels, stride=2), conv(channels, channels))
            for channels_in, channels in zip(PYRAMID_CHANNELS[:-1], PYRAMID_CHANNELS[1:])
        ])

    def construct(self, image):
        """(N, 3, H, W) to six features (N, C_l, H / 2^l, W / 2^l), finest first."""
        pyramid = ()
        x = image
        for level in self.convs:
            x = level(x)
            pyramid = pyramid + (x,)
        return pyramid


class FlowEstimator(nn.Cell):
    """Five convolutions and a linear one that turn cost volume and features into flow.

    Dense (as in DenseNet) each layer's output is concatenated in front of its input; plain, it
    replaces it.
    """

    def __init__(self, channels_in, dense=True):
        super().__init__()
        self.dense = dense
        layers = []
        for channels in ESTIMATOR_CHANNELS:
            layers.append(conv(channels_in, channels))
            channels_in = channels_in + channels if dense else channels
        self.conv1, self.conv2, self.conv3, self.conv4, self.conv5 = layers
        self.conv_last = conv(channels_in, 2, activation=False)
        self.channels_out = channels_in

    def construct(self, x):
        """(N, C, H, W) to the features before the last layer and the flow (N, 2, H, W)."""
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5):
            y = layer(x)
            x = ops.concat((y, x), 1) if self.dense else y
        return x, self.conv_last(x)


class ContextNetwork(nn.Cell):
    """Dilated convolutions that correct the finest flow from a wide neighbourhood."""

    def __init__(self, channels_in):
        super().__init__()
        layers = []
        for channels, dilation in CONTEXT_LAYERS:
            layers.append(conv(channels_in, channels, dilation=dilation))
            channels_in = channels
        layers.append(conv(channels_in, 2, activation=False))
        self.convs = nn.SequentialCell(layers)

    def construct(self, x):
        """(N, C, H, W) to a flow correction (N, 2, H, W)."""
        return self.convs(x)


def normalize_pair(features1, features2):
    """Bring both features to zero mean and unit variance, by one statistic per sample.

    The statistic runs over both images, all channels and pixels: R. Jonschkowski et al., "What
    Matters in Unsupervised Optical Flow", ECCV 2020, section 4.2. Without it an untrained
    network's cost volume is close to zero.
    """
    both = ops.concat((features1, features2), 1)
    mean = both.mean((1, 2, 3), keep_dims=True)
    variance = (both - mean).square().mean((1, 2, 3), keep_dims=True)
    scale = (variance + 1e-12).rsqrt()
    return (features1 - mean) * scale, (features2 - mean) * scale


class PWCNet(nn.Cell):
    """The network; 8,639,230 parameters when dense.

    Args:
        dense: dense flow estimators, as published; otherwise plain ones.
        normalize_features: normalise the features before each cost volume (`normalize_pair`).
            Published weights were trained without it.
        warp_mode: "bilinear", as published, or "nearest".
    """

    def __init__(self, dense=True, normalize_features=False, warp_mode="bilinear"):
        super().__init__()
        self.normalize_features = normalize_features
        self.warp_mode = warp_mode
        self.feature_pyramid_extractor = FeaturePyramid()
        costs = (2 * SEARCH_RANGE + 1) ** 2
        finer = PYRAMID_CHANNELS[-2:-OUTPUT_LEVELS - 1:-1]
        estimators = [FlowEstimator(costs, dense)]
        estimators += [FlowEstimator(costs + channels + 2, dense) for channels in finer]
        self.flow_estimators = nn.CellList(estimators)
        self.context_networks = ContextNetwork(estimators[-1].channels_out + 2)
        self.activation = nn.LeakyReLU(0.1)

    def construct(self, image1, image2):
        """Estimate the flow from image 1 to image 2, at five resolutions.

        Args:
            image1, image2: (N, 3, H, W) float32 RGB in [0, 1]; H and W multiples of 64.

        Returns:
            Five flows, coarse to fine, (N, 2, H / 2^l, W / 2^l) for l = 6 to 2, float32, in
            full-resolution pixels times `DIV_FLOW`.
        """
        pyramid1 = self.feature_pyramid_extractor(image1)
        pyramid2 = self.feature_pyramid_extractor(image2)
        flows = ()
        flow = None
        for index in range(OUTPUT_LEVELS):
            features1, features2 = pyramid1[-1 - index], pyramid2[-1 - index]
            estimator = self.flow_estimators[index]
            if index == 0:
                dense, flow = estimator(self.match(features1, features2))
            else:
                flow = resize(flow, features1.shape[2:])
                features2 = self.warp_to_first(features2, flow, image1.shape[2:])
                costs = self.match(features1, features2)
                inputs = (costs, features1, flow.astype(features1.dtype))
                dense, flow = estimator(ops.concat(inputs, 1))
            flow = flow.astype(float32)
            if index == OUTPUT_LEVELS - 1:
                inputs = (dense, flow.astype(dense.dtype))
                flow = flow + self.context_networks(ops.concat(inputs, 1)).astype(float32)
            flows = flows + (flow,)
        return flows

    def match(self, features1, features2):
        """The activated cost volume, computed in float32 and returned in the features' type."""
        dtype = features1.dtype
        features1, features2 = features1.astype(float32), features2.astype(float32)
        if self.normalize_features:
            features1, features2 = normalize_pair(features1, features2)
        return self.activation(cost_volume(features1, features2)).astype(dtype)

    def warp_to_first(self, features2, flow, image_size):
        """Warp a level's features of image 2 by a flow of the same level, in float32.

        Full-resolution pixels become pixels of the level by the ratio of (side - 1), since with
        aligned corners the first and the last pixel's centres are one apart from the other.
        """
        (height, width), (image_height, image_width) = features2.shape[2:], image_size
        scale_x = (width - 1) / (image_width - 1) / DIV_FLOW
        scale_y = (height - 1) / (image_height - 1) / DIV_FLOW
        pixels = ops.stack((flow[:, 0] * scale_x, flow[:, 1] * scale_y), 1)
        return warp(features2.astype(float32), pixels, self.warp_mode).astype(features2.dtype)


def start_from_coarser_flow(network, share=0.1):
    """Change a new network's weights so that each level begins with the flow of the coarser one.

    The last convolution of every estimator reads the upsampled flow, its last two input channels;
    it starts as passing that on, plus `share` of what its random weights make of the rest. With
    random weights alone a level must first learn to hand the flow on, which takes most of a short
    training. The weights are those of the same network: nothing else changes.

    Args:
        network: a dense `PWCNet`.
    """
    for index, estimator in enumerate(network.flow_estimators):
        layer = estimator.conv_last[0]
        weight = layer.weight.asnumpy() * np.float32(share)
        if index > 0:
            weight[:, -2:] = 0
            weight[[0, 1], [-2, -1], 1, 1] = 1
        layer.weight.set_data(Tensor(weight))
    layer = network.context_networks.convs[-1][0]
    layer.weight.set_data(Tensor(layer.weight.asnumpy() * np.float32(share)))


def resize(x, size):
    """Resize (N, C, H, W) bilinearly to a size (height, width), corners aligned."""
    return ops.interpolate(x, size=size, mode="bilinear", align_corners=True)


class FlowPredictor(nn.Cell):
    """The trained network as it is used: two uint8 images of any size in, flow in pixels out.

    Sides that are no multiples of 64 are met by resizing the images, not by padding them: padding
    puts an edge into the picture that moves with neither image, and published results of this
    network were made by resizing.
    """

    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, image1, image2):
        """(N, H, W, 3) uint8 RGB images to flow (N, H, W, 2) float32 in pixels."""
        _, height, width, _ = image1.shape
        inner = (round_up(height), round_up(width))
        images = ()
        for image in (image1, image2):
            image = to_network(image)
            if inner != (height, width):
                image = resize(image, inner)
            images = images + (image,)
        flow = resize(self.network(*images)[-1], (height, width)) / DIV_FLOW
        u, v = flow[:, 0] * (width / inner[1]), flow[:, 1] * (height / inner[0])
        return ops.stack((u, v), 3)


def to_network(image):
    """(N, H, W, 3) uint8 to the network's (N, 3, H, W) float32 in [0, 1]."""
    return image.transpose(0, 3, 1, 2).astype(float32) / 255


def round_up(side):
    """The next multiple of `SIZE_MULTIPLE` from a side in pixels up."""
    return -(-side // SIZE_MULTIPLE) * SIZE_MULTIPLE
