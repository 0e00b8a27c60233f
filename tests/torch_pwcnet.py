"""Both variants of PWC-Net in PyTorch, with the names of the published checkpoints.

Written from the papers and the list of names, independently of `model/`, for comparisons. `IRR` and `NVlabs` take two
images (N, 3, H, W) float32 in [0, 1], IRR as RGB and NVlabs as BGR, and return five flows, coarse to fine, in
full-resolution pixels x 0.05.
"""

import torch
from torch import nn
from torch.nn import functional

CHANNELS = {0: 3, 1: 16, 2: 32, 3: 64, 4: 96, 5: 128, 6: 196}
DENSE = (128, 128, 96, 64, 32)
CONTEXT = ((128, 1), (128, 2), (128, 4), (96, 8), (64, 16), (32, 1))


def layer(channels_in: int, channels_out: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution and LeakyReLU."""
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride, dilation, dilation)
    return nn.Sequential(convolution, nn.LeakyReLU(0.1))


def cost_volume(features1: torch.Tensor, features2: torch.Tensor) -> torch.Tensor:
    """81 displacements, one slice of the padded second features each, activated."""
    height, width = features1.shape[2:]
    padded = functional.pad(features2, (4, 4, 4, 4))
    slices = [(features1 * padded[:, :, y : y + height, x : x + width]).mean(1) for y in range(9) for x in range(9)]
    return functional.leaky_relu(torch.stack(slices, 1), 0.1)


def warp(features: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Sample at a displacement in pixels of the level; zero if weights inside sum below 0.9999."""
    height, width = features.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x = 2 * (columns.to(u) + u) / max(width - 1, 1) - 1
    y = 2 * (rows.to(v) + v) / max(height - 1, 1) - 1
    grid = torch.stack((x, y), 3)
    inside = functional.grid_sample(torch.ones_like(features), grid, align_corners=True)
    return functional.grid_sample(features, grid, align_corners=True) * (inside >= 0.9999)


class Dense(nn.Module):
    """IRR's flow estimator."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for number, new in enumerate(DENSE, 1):
            setattr(self, f"conv{number}", layer(channels, new))
            channels += new
        self.conv_last = nn.Sequential(nn.Conv2d(channels, 2, 3, padding=1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for number in range(1, 6):
            x = torch.cat((getattr(self, f"conv{number}")(x), x), 1)
        return x, self.conv_last(x)


class IRR(nn.Module):
    """Hur and Roth's variant, `PWCNet` of visinf/irr."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_pyramid_extractor = nn.Module()
        self.feature_pyramid_extractor.convs = nn.ModuleList(
            nn.Sequential(layer(CHANNELS[level - 1], CHANNELS[level], 2), layer(CHANNELS[level], CHANNELS[level]))
            for level in range(1, 7)
        )
        self.flow_estimators = nn.ModuleList(
            Dense(81 if level == 6 else 81 + CHANNELS[level] + 2) for level in range(6, 1, -1)
        )
        channels, layers = 81 + CHANNELS[2] + 2 + sum(DENSE) + 2, []
        for new, dilation in CONTEXT:
            layers.append(layer(channels, new, dilation=dilation))
            channels = new
        self.context_networks = nn.Module()
        self.context_networks.convs = nn.Sequential(*layers, nn.Sequential(nn.Conv2d(channels, 2, 3, padding=1)))

    def forward(self, image1: torch.Tensor, image2: torch.Tensor) -> list[torch.Tensor]:
        height, width = image1.shape[2:]
        levels, x1, x2 = [], image1, image2
        for convolutions in self.feature_pyramid_extractor.convs:
            x1, x2 = convolutions(x1), convolutions(x2)
            levels.insert(0, (x1, x2))
        x, flow = self.flow_estimators[0](cost_volume(*levels[0]))
        flows = [flow]
        for estimator, (x1, x2) in zip(self.flow_estimators[1:], levels[1:5], strict=True):
            flow = functional.interpolate(flow, x1.shape[2:], mode="bilinear", align_corners=True)
            u = flow[:, 0] / 0.05 * (x1.shape[3] - 1) / (width - 1)
            v = flow[:, 1] / 0.05 * (x1.shape[2] - 1) / (height - 1)
            costs = cost_volume(x1, warp(x2, u, v))
            x, flow = estimator(torch.cat((costs, x1, flow), 1))
            flows.append(flow)
        flows[-1] = flow + self.context_networks.convs(torch.cat((x, flow), 1))
        return flows


class NVlabs(nn.Module):
    """The authors' variant, `pwc_dc_net` of NVlabs/PWC-Net."""

    def __init__(self) -> None:
        super().__init__()
        for level in range(1, 7):
            before, new = CHANNELS[level - 1], CHANNELS[level]
            first, second = ("aa", "a") if level == 6 else ("a", "aa")
            setattr(self, f"conv{level}{first}", layer(before, new, 2))
            setattr(self, f"conv{level}{second}", layer(new, new))
            setattr(self, f"conv{level}b", layer(new, new))
        channels = 0
        for level in range(6, 1, -1):
            channels = 81 if level == 6 else 81 + CHANNELS[level] + 4
            for number, new in enumerate(DENSE):
                setattr(self, f"conv{level}_{number}", layer(channels, new))
                channels += new
            setattr(self, f"predict_flow{level}", nn.Conv2d(channels, 2, 3, padding=1))
            setattr(self, f"deconv{level}", nn.ConvTranspose2d(2, 2, 4, 2, 1))
            if level > 2:
                setattr(self, f"upfeat{level}", nn.ConvTranspose2d(channels, 2, 4, 2, 1))
        for number, (new, dilation) in enumerate(CONTEXT, 1):
            setattr(self, f"dc_conv{number}", layer(channels, new, dilation=dilation))
            channels = new
        self.dc_conv7 = nn.Conv2d(channels, 2, 3, padding=1)

    def pyramid(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        """Features of levels 1 to 6."""
        features = {}
        for level in range(1, 7):
            for part in ("aa", "a", "b") if level == 6 else ("a", "aa", "b"):
                x = getattr(self, f"conv{level}{part}")(x)
            features[level] = x
        return features

    def estimate(self, level: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A level's last features and its flow."""
        for number in range(5):
            x = torch.cat((getattr(self, f"conv{level}_{number}")(x), x), 1)
        return x, getattr(self, f"predict_flow{level}")(x)

    def forward(self, image1: torch.Tensor, image2: torch.Tensor) -> list[torch.Tensor]:
        features1, features2 = self.pyramid(image1), self.pyramid(image2)
        x, flow = self.estimate(6, cost_volume(features1[6], features2[6]))
        flows = [flow]
        for level, factor in ((5, 0.625), (4, 1.25), (3, 2.5), (2, 5.0)):
            up = getattr(self, f"deconv{level + 1}")(flow)
            up_features = getattr(self, f"upfeat{level + 1}")(x)
            warped = warp(features2[level], up[:, 0] * factor, up[:, 1] * factor)
            costs = cost_volume(features1[level], warped)
            x, flow = self.estimate(level, torch.cat((costs, features1[level], up, up_features), 1))
            flows.append(flow)
        for number in range(1, 8):
            x = getattr(self, f"dc_conv{number}")(x)
        flows[-1] = flow + x
        return flows
