"""PWC-Net: feature pyramid, warping, cost volume, flow estimators and context network.

D. Sun, X. Yang, M.-Y. Liu, J. Kautz, "PWC-Net: CNNs for Optical Flow Using Pyramid, Warping, and
Cost Volume", CVPR 2018, in two variants whose published weights differ in layers and conventions:

"irr": J. Hur and S. Roth, "Iterative Residual Refinement for Joint Optical Flow and Occlusion
    Estimation", CVPR 2019: two convolutions per pyramid level, bilinear upsampling between levels.
"nvlabs": the authors' own PyTorch network (NVlabs/PWC-Net, `pwc_dc_net`): three convolutions per
    pyramid level, learnt upsampling of the flow and of two feature channels.
"""

import itertools

import numpy as np
from mindspore import Tensor, float32, int32, nn, ops
from mindspore.common.initializer import HeNormal

from model import exportable, native
from model.backend import Backend, resolve_backend
from model.layers import conv, keep_blocked_layout, native_flow_estimator, native_unpack_features
from model.operators import COST_CHANNELS, CostVolume, Warp, normalize_pair
from model.precision import Precision
from model.resizing import resize

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

    def __init__(self, depth: int, backend: Backend) -> None:
        super().__init__()
        levels = []
        for channels_in, channels in itertools.pairwise(PYRAMID_CHANNELS):
            layers = [conv(channels_in, channels, backend, stride=2, reads_image=not levels)]
            layers += [conv(channels, channels, backend) for _ in range(depth - 1)]
            levels.append(layers)
        keep_blocked_layout(levels[0] + levels[1])  # only the second level reads the first one
        for layers in levels[2:]:
            keep_blocked_layout(layers)
        self.convs = nn.CellList([nn.SequentialCell(*layers) for layers in levels])

    def construct(self, image: Tensor) -> tuple[Tensor, ...]:
        """(N, 3, H, W) to features (N, C_l, H / 2^l, W / 2^l) for l = 2 to 6, finest first."""
        pyramid = ()
        x = self.convs[0](image)
        for level in self.convs[1:]:
            x = level(x)
            pyramid = pyramid + (x,)
        return pyramid


class FlowEstimator(nn.Cell):
    """Five convolutions and a linear one that turn cost volume and features into flow.

    Dense (as in DenseNet) each layer's output is concatenated in front of its input; plain, it replaces it. The native
    operator for dense estimators computes everything in one buffer.

    Args:
        channels_in: of the input.
        dense: dense layers, or plain ones.
        backend: of the network.
        reader: what reads the features before the last layer: the next level's "upsampling", the "context" network, the
            "context and flow", which gets the flow with them, or nothing, "".

    Attributes:
        channels_out: of the features, without the flow.
    """

    def __init__(self, channels_in: int, dense: bool, backend: Backend, reader: str = "") -> None:
        super().__init__()
        layers = []
        for channels in ESTIMATOR_CHANNELS:
            layers.append(conv(channels_in, channels, backend))
            channels_in = channels_in + channels if dense else channels
        self.conv1, self.conv2, self.conv3, self.conv4, self.conv5 = layers
        self.conv_last = conv(channels_in, 2, backend, activation=False)
        self.channels_out = channels_in
        self.dense = dense
        self.reader = reader
        self.with_flow = reader == "context and flow"
        self.can_fuse = dense and backend == "native"
        self.set_precision("float32")

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) to the features for the reader, in a layout that it reads, and the flow (N, 2, H, W)."""
        layers = (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5)
        if self.is_fused:
            layers = (*layers, self.conv_last)
            weights, biases = [layer[0].weight for layer in layers], [layer[0].bias for layer in layers]
            features, flow = self.operator(x, *weights, *biases, self.settings)
            if self.reader == "upsampling":
                features = self.unpack(features)
            return features, flow
        for layer in layers:
            y = layer(x)
            x = ops.concat((y, x), 1) if self.dense else y
        flow = self.conv_last(x)
        if self.with_flow:
            x = ops.concat((x, flow.astype(x.dtype)), 1)
        return x, flow

    def set_precision(self, precision: Precision) -> None:
        """Compute in `precision` from here on; the layers themselves are set apart from this."""
        bfloat16 = precision == "bfloat16"
        self.is_fused = self.can_fuse and precision != "float16" and native.estimator_block(bfloat16) > 0
        if self.is_fused:
            self.settings = Tensor([bfloat16, self.with_flow], int32)
            self.operator = native_flow_estimator(precision, self.with_flow, self.reader != "")
            self.unpack = native_unpack_features(self.channels_out)


class BilinearUpsampling(nn.Cell):
    """Input of an "irr" level that is upsampled from the coarser level: its flow, interpolated."""

    channels_out = 2

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.resize = exportable.resize if backend == "exportable" else resize

    def construct(self, flow: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Flow (N, 2, h, w) to (N, 2, 2 h, 2 w), `size` being (2 h, 2 w)."""
        return self.resize(flow, size)


class TransposedUpsampling(nn.Cell):
    """Input of an "nvlabs" level that is upsampled from the coarser level: flow and two feature channels, learnt."""

    channels_out = 4

    def __init__(self, channels_in: int) -> None:
        super().__init__()
        self.flow = doubling_convolution(2)
        self.features = doubling_convolution(channels_in)

    def construct(self, flow: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Flow (N, 2, h, w) and features (N, C, h, w) to (N, 4, 2 h, 2 w), float32, flow first."""
        return ops.concat((self.flow(flow), self.features(features.astype(float32))), 1)


def doubling_convolution(channels_in: int) -> nn.Conv2dTranspose:
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

    def __init__(self, channels_in: int, backend: Backend) -> None:
        super().__init__()
        layers = []
        for channels, dilation in CONTEXT_LAYERS:
            layers.append(conv(channels_in, channels, backend, dilation=dilation))
            channels_in = channels
        layers.append(conv(channels_in, 2, backend, activation=False))
        keep_blocked_layout(layers)
        self.convs = nn.SequentialCell(layers)

    def construct(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to a flow correction (N, 2, H, W)."""
        return self.convs(x)


class PWCNet(nn.Cell):
    """The network; when dense, of 8,639,230 parameters ("irr") or 9,374,274 ("nvlabs").

    Args:
        variant: "irr" or "nvlabs", see the top of this file.
        dense: dense flow estimators, as published; otherwise plain ones.
        normalize_features: normalise the features before each cost volume (`normalize_pair`). Published weights were
            trained without it.
        warp_mode: "bilinear", as published, or "nearest".
        backend: the operators to compute with, see model/backend.py. "native" becomes "mindspore" where the native
            operators are unavailable.

    Attributes:
        backend: the one in use.
        precision: number format of the convolutions; see `model.precision.set_precision`.

    Raises:
        ValueError: there is no such variant or backend.
    """

    def __init__(
        self,
        variant: str = "irr",
        dense: bool = True,
        normalize_features: bool = False,
        warp_mode: str = "bilinear",
        backend: Backend = "native",
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
        irr = variant == "irr"
        backend = resolve_backend(backend)
        self.backend = backend
        self.variant = variant
        self.dense = dense
        self.normalize_features = normalize_features
        self.precision = "float32"
        self.align_corners = irr
        self.feature_pyramid_extractor = FeaturePyramid(2 if irr else 3, backend)
        readers = ["" if irr else "upsampling"] * (OUTPUT_LEVELS - 1) + ["context and flow" if irr else "context"]
        estimators, upsamplings = [FlowEstimator(COST_CHANNELS, dense, backend, readers[0])], []
        for channels, reader in zip(PYRAMID_CHANNELS[-2 : -OUTPUT_LEVELS - 1 : -1], readers[1:], strict=True):
            coarser = estimators[-1].channels_out
            upsamplings.append(BilinearUpsampling(backend) if irr else TransposedUpsampling(coarser))
            channels_in = COST_CHANNELS + channels + upsamplings[-1].channels_out
            estimators.append(FlowEstimator(channels_in, dense, backend, reader))
        self.flow_estimators = nn.CellList(estimators)
        self.upsamplings = nn.CellList(upsamplings)
        self.context_networks = ContextNetwork(estimators[-1].channels_out + (2 if irr else 0), backend)
        self.cost_volume = CostVolume(backend)
        self.warp = Warp(warp_mode, backend)
        self.split = ops.Split(0, 2)
        self.normalize_pair = exportable.normalize_pair if backend == "exportable" else normalize_pair

    @property
    def graph_key(self) -> tuple[str | bool, ...]:
        """What determines the network's compiled graph, with the shape of the images."""
        options = self.variant, self.dense, self.normalize_features, self.warp.mode
        return (*options, self.backend, self.precision)

    def construct(self, image1: Tensor, image2: Tensor) -> tuple[Tensor, ...]:
        """Estimate the flow from image 1 to image 2, at five resolutions.

        Args:
            image1, image2: (N, 3, H, W) float32 RGB in [0, 1]; H and W multiples of 64.

        Returns:
            Five flows, coarse to fine, (N, 2, H / 2^l, W / 2^l) for l = 6 to 2, float32, in
            full-resolution pixels times `DIV_FLOW`.
        """
        # Both images as one batch: half as many operators to compile and to start.
        pyramid = self.feature_pyramid_extractor(ops.concat((image1, image2), 0))
        flows = ()
        flow, shared = None, None
        for index in range(OUTPUT_LEVELS):
            features1, features2 = self.split(pyramid[-1 - index])
            estimator = self.flow_estimators[index]
            if index == 0:
                shared, flow = estimator(self.match(features1, features2))
            else:
                coarser = self.upsamplings[index - 1](flow, shared, features1.shape[2:])
                features2 = self.warp_to_first(features2, coarser, image1.shape[2:])
                costs = self.match(features1, features2)
                inputs = (costs, features1, coarser.astype(features1.dtype))
                shared, flow = estimator(ops.concat(inputs, 1))
            flow = flow.astype(float32)
            if index == OUTPUT_LEVELS - 1:
                flow = flow + self.context_networks(shared).astype(float32)
            flows = flows + (flow,)
        return flows

    def match(self, features1: Tensor, features2: Tensor) -> Tensor:
        """The activated cost volume, computed in float32 and returned in the features' type."""
        dtype = features1.dtype
        features1, features2 = features1.astype(float32), features2.astype(float32)
        if self.normalize_features:
            features1, features2 = self.normalize_pair(features1, features2)
        return self.cost_volume(features1, features2).astype(dtype)

    def warp_to_first(self, features2: Tensor, flow: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Warp a level's features of image 2 by the flow, the first two channels of the upsampled input.

        In float32. With aligned corners, full-resolution pixels become pixels of the level by
        the ratio of (side - 1), the distance of the first and the last pixel's centres; otherwise
        by the ratio of the sides, a power of two.
        """
        (height, width), (image_height, image_width) = features2.shape[2:], image_size
        one = 1 if self.align_corners else 0
        scale_x = (width - one) / (image_width - one) / DIV_FLOW
        scale_y = (height - one) / (image_height - one) / DIV_FLOW
        pixels = flow[:, :2] * Tensor([[[scale_x]], [[scale_y]]], float32)
        # The published networks mask a sample by the sum of its weights inside the image: NVlabs below 0.9999, IRR
        # below 1. `warp` tests the position itself. That equals the first except for samples less than 1e-4 pixels
        # outside, and the second without its rounding: a float32 sum of four weights may fall below 1 anywhere.
        return self.warp(features2.astype(float32), pixels).astype(features2.dtype)


def start_from_coarser_flow(network: PWCNet, share: float = 0.1) -> None:
    """Change a new network's weights so that each level starts from the flow of the coarser one.

    The last convolution of every estimator reads the upsampled flow, two of its last input channels. It starts by
    passing that on, plus `share` of what its random weights make of the rest. With random weights alone a level must
    first learn to pass the flow on, which takes most of a short training. Learnt upsampling of the flow starts as
    bilinear. Only weights change, not the network.

    Args:
        network: a dense `PWCNet`.
        share: factor of the random weights.
    """
    for index, estimator in enumerate(network.flow_estimators):
        layer = estimator.conv_last[0]
        weight = layer.weight.asnumpy() * np.float32(share)
        if index > 0:
            first = -network.upsamplings[index - 1].channels_out
            weight[:, first:] = 0
            weight[[0, 1], [first, first + 1], 1, 1] = 1
        layer.weight.set_data(Tensor(weight))
    layer = network.context_networks.convs[-1][0]
    layer.weight.set_data(Tensor(layer.weight.asnumpy() * np.float32(share)))
    if network.variant == "nvlabs":
        slope = np.array([1, 3, 3, 1], np.float32) / 4
        bilinear = np.eye(2, dtype=np.float32)[:, :, None, None] * np.outer(slope, slope)
        for upsampling in network.upsamplings:
            upsampling.flow.weight.set_data(Tensor(bilinear))


def to_network(image: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 to the network's (N, 3, H, W) float32 in [0, 1]."""
    return image.transpose(0, 3, 1, 2).astype(float32) / 255


def round_up(side: int) -> int:
    """The next multiple of `SIZE_MULTIPLE` from a side in pixels up."""
    return -(-side // SIZE_MULTIPLE) * SIZE_MULTIPLE
