"""PWC-Net: feature pyramid, warping, cost volume, flow estimators and context network.

D. Sun, X. Yang, M.-Y. Liu, J. Kautz, "PWC-Net: CNNs for Optical Flow Using Pyramid, Warping, and
Cost Volume", CVPR 2018, in two variants whose published weights differ in layers and conventions:

"irr": J. Hur and S. Roth, "Iterative Residual Refinement for Joint Optical Flow and Occlusion
    Estimation", CVPR 2019: two convolutions a pyramid level, bilinear upsampling between levels.
"nvlabs": the authors' own PyTorch network (NVlabs/PWC-Net, `pwc_dc_net`): three convolutions a
    pyramid level, learnt upsampling of the flow and of two feature channels.
"""

import numpy as np
from mindspore import Tensor, float32, nn, ops
from mindspore.common.initializer import HeNormal

from model.layers import conv
from model.operators import SEARCH_RANGE, CostVolume, Warp

VARIANTS = ("irr", "nvlabs")
PYRAMID_CHANNELS = (3, 16, 32, 64, 96, 128, 196)
ESTIMATOR_CHANNELS = (128, 128, 96, 64, 32)
CONTEXT_LAYERS = ((128, 1), (128, 2), (128, 4), (96, 8), (64, 16), (32, 1))  # channels, dilation
OUTPUT_LEVELS = 5  # of the six pyramid levels, from the coarsest: the last is quarter resolution
DIV_FLOW = 0.05
"""The network's flow is full-resolution pixels times this, at every level."""
SIZE_MULTIPLE = 2 ** (len(PYRAMID_CHANNELS) - 1)
"""Image sides must be multiples of this many pixels."""


class FeaturePyramid(nn.Cell):
    """Features of one image at halved resolutions, `depth` convolutions each."""

    def __init__(self, depth) -> None:
        super().__init__()
        self.convs = nn.CellList(
            [
                nn.SequentialCell(
                    conv(channels_in, channels, stride=2), *(conv(channels, channels) for _ in range(depth - 1))
                )
                for channels_in, channels in zip(PYRAMID_CHANNELS[:-1], PYRAMID_CHANNELS[1:])
            ]
        )

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

    def __init__(self, channels_in, dense=True) -> None:
        super().__init__()
        layers = []
        for channels in ESTIMATOR_CHANNELS:
            layers.append(conv(channels_in, channels, concatenate=dense))
            channels_in = channels_in + channels if dense else channels
        self.conv1, self.conv2, self.conv3, self.conv4, self.conv5 = layers
        self.conv_last = conv(channels_in, 2, activation=False)
        self.channels_out = channels_in

    def construct(self, x):
        """(N, C, H, W) to the features before the last layer and the flow (N, 2, H, W)."""
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5):
            x = layer(x)
        return x, self.conv_last(x)


class BilinearUpsampling(nn.Cell):
    """What a level of the variant "irr" hears from the coarser one: its flow, interpolated."""

    channels_out = 2

    def construct(self, flow, dense, size):
        """Flow (N, 2, h, w) to (N, 2, 2 h, 2 w), `size` being (2 h, 2 w)."""
        return resize(flow, size)


class TransposedUpsampling(nn.Cell):
    """What a level of the variant "nvlabs" hears: flow and two feature channels, both learnt."""

    channels_out = 4

    def __init__(self, channels_in) -> None:
        super().__init__()
        self.flow = doubling(2)
        self.features = doubling(channels_in)

    def construct(self, flow, dense, size):
        """Flow (N, 2, h, w) and features (N, C, h, w) to (N, 4, 2 h, 2 w), float32, flow first."""
        return ops.concat((self.flow(flow), self.features(dense.astype(float32))), 1)


def doubling(channels_in):
    """A transposed convolution to two channels of twice the size."""
    return nn.Conv2dTranspose(
        channels_in,
        2,
        4,
        2,
        pad_mode="pad",
        padding=1,
        has_bias=True,
        weight_init=HeNormal(),
        bias_init="zeros",
    )


class ContextNetwork(nn.Cell):
    """Dilated convolutions that correct the finest flow from a wide neighbourhood."""

    def __init__(self, channels_in) -> None:
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
    """The network; when dense, of 8,639,230 parameters ("irr") or 9,374,274 ("nvlabs").

    Args:
        variant: "irr" or "nvlabs", see the top of this file.
        dense: dense flow estimators, as published; otherwise plain ones.
        normalize_features: normalise the features before each cost volume (`normalize_pair`).
            Published weights were trained without it.
        warp_mode: "bilinear", as published, or "nearest".

    Raises:
        ValueError: no such variant.
    """

    def __init__(self, variant="irr", dense=True, normalize_features=False, warp_mode="bilinear") -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
        irr = variant == "irr"
        self.variant = variant
        self.dense = dense
        self.normalize_features = normalize_features
        self.align_corners = irr
        self.context_sees_flow = irr
        self.feature_pyramid_extractor = FeaturePyramid(depth=2 if irr else 3)
        costs = (2 * SEARCH_RANGE + 1) ** 2
        estimators, upsamplings = [FlowEstimator(costs, dense)], []
        for channels in PYRAMID_CHANNELS[-2 : -OUTPUT_LEVELS - 1 : -1]:
            coarser = estimators[-1].channels_out
            upsamplings.append(BilinearUpsampling() if irr else TransposedUpsampling(coarser))
            channels_in = costs + channels + upsamplings[-1].channels_out
            estimators.append(FlowEstimator(channels_in, dense))
        self.flow_estimators = nn.CellList(estimators)
        self.upsamplings = nn.CellList(upsamplings)
        self.context_networks = ContextNetwork(estimators[-1].channels_out + (2 if irr else 0))
        self.cost_volume = CostVolume()
        self.warp = Warp(warp_mode)

    def construct(self, image1, image2):
        """Estimate the flow from image 1 to image 2, at five resolutions.

        Args:
            image1, image2: (N, 3, H, W) float32 RGB in [0, 1]; H and W multiples of 64.

        Returns:
            Five flows, coarse to fine, (N, 2, H / 2^l, W / 2^l) for l = 6 to 2, float32, in
            full-resolution pixels times `DIV_FLOW`.
        """
        # Both images as one batch: half as many operators to compile and to start.
        pyramid = self.feature_pyramid_extractor(ops.concat((image1, image2), 0))
        batch = image1.shape[0]
        flows = ()
        flow, dense = None, None
        for index in range(OUTPUT_LEVELS):
            features = pyramid[-1 - index]
            features1, features2 = features[:batch], features[batch:]
            estimator = self.flow_estimators[index]
            if index == 0:
                dense, flow = estimator(self.match(features1, features2))
            else:
                coarser = self.upsamplings[index - 1](flow, dense, features1.shape[2:])
                features2 = self.warp_to_first(features2, coarser, image1.shape[2:])
                costs = self.match(features1, features2)
                inputs = (costs, features1, coarser.astype(features1.dtype))
                dense, flow = estimator(ops.concat(inputs, 1))
            flow = flow.astype(float32)
            if index == OUTPUT_LEVELS - 1:
                inputs = dense
                if self.context_sees_flow:
                    inputs = ops.concat((dense, flow.astype(dense.dtype)), 1)
                flow = flow + self.context_networks(inputs).astype(float32)
            flows = flows + (flow,)
        return flows

    def match(self, features1, features2):
        """The activated cost volume, computed in float32 and returned in the features' type."""
        dtype = features1.dtype
        features1, features2 = features1.astype(float32), features2.astype(float32)
        if self.normalize_features:
            features1, features2 = normalize_pair(features1, features2)
        return self.cost_volume(features1, features2).astype(dtype)

    def warp_to_first(self, features2, flow, image_size):
        """Warp a level's features of image 2 by the flow, the first two channels of what came up.

        Done in float32. With aligned corners, full-resolution pixels become pixels of the level by
        the ratio of (side - 1), the distance of the first and the last pixel's centres; otherwise
        by the ratio of the sides, a power of two.
        """
        (height, width), (image_height, image_width) = features2.shape[2:], image_size
        one = 1 if self.align_corners else 0
        scale_x = (width - one) / (image_width - one) / DIV_FLOW
        scale_y = (height - one) / (image_height - one) / DIV_FLOW
        pixels = ops.stack((flow[:, 0] * scale_x, flow[:, 1] * scale_y), 1)
        # The published networks mask by the sum of a sample's weights inside: NVlabs below 0.9999,
        # IRR below 1. `warp` asks where the sample lies, which is the first but for samples less
        # than 1e-4 pixels outside, and the second without its rounding: a float32 sum of four
        # weights may fall short of 1 anywhere.
        return self.warp(features2.astype(float32), pixels).astype(features2.dtype)


def start_from_coarser_flow(network, share=0.1) -> None:
    """Change a new network's weights so that each level begins with the flow of the coarser one.

    The last convolution of every estimator reads the upsampled flow, of its input channels two of
    the last; it starts as passing that on, plus `share` of what its random weights make of the
    rest. With random weights alone a level must first learn to hand the flow on, which takes most
    of a short training. The weights are those of the same network: nothing else changes. Learnt
    upsampling of the flow starts as a bilinear one.

    Args:
        network: a dense `PWCNet`.
    """
    for index, estimator in enumerate(network.flow_estimators):
        layer = estimator.conv_last[0]
        weight = layer.weight.asnumpy() * np.float32(share)
        if index > 0:
            u = -network.upsamplings[index - 1].channels_out
            weight[:, u:] = 0
            weight[[0, 1], [u, u + 1], 1, 1] = 1
        layer.weight.set_data(Tensor(weight))
    layer = network.context_networks.convs[-1][0]
    layer.weight.set_data(Tensor(layer.weight.asnumpy() * np.float32(share)))
    if network.variant == "nvlabs":
        slope = np.float32([1, 3, 3, 1]) / 4
        bilinear = np.eye(2, dtype=np.float32)[:, :, None, None] * np.outer(slope, slope)
        for upsampling in network.upsamplings:
            upsampling.flow.weight.set_data(Tensor(bilinear))


def resize(x, size, align_corners=True):
    """Resize (N, C, H, W) bilinearly to a size (height, width)."""
    return ops.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


class FlowPredictor(nn.Cell):
    """The trained network as it is used: two uint8 images of any size in, flow in pixels out.

    Sides that are no multiples of 64 are met by resizing the images, not by padding them: padding
    puts an edge into the picture that moves with neither image, and published results of this
    network were made by resizing, with corners aligned (irr) or not (nvlabs).
    """

    def __init__(self, network) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        # Any Cell from two images to flows will do; one that says nothing of corners aligns them.
        self.align_corners = getattr(network, "align_corners", True)

    def construct(self, image1, image2):
        """(N, H, W, 3) uint8 RGB images to flow (N, H, W, 2) float32 in pixels."""
        _, height, width, _ = image1.shape
        inner = (round_up(height), round_up(width))
        images = ()
        for image in (image1, image2):
            image = to_network(image)
            if inner != (height, width):
                image = resize(image, inner, self.align_corners)
            images = images + (image,)
        flow = self.network(*images)[-1]
        flow = resize(flow, (height, width), self.align_corners) / DIV_FLOW
        u, v = flow[:, 0] * (width / inner[1]), flow[:, 1] * (height / inner[0])
        return ops.stack((u, v), 3)


def to_network(image):
    """(N, H, W, 3) uint8 to the network's (N, 3, H, W) float32 in [0, 1]."""
    return image.transpose(0, 3, 1, 2).astype(float32) / 255


def round_up(side):
    """The next multiple of `SIZE_MULTIPLE` from a side in pixels up."""
    return -(-side // SIZE_MULTIPLE) * SIZE_MULTIPLE
