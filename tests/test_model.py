"""The network, its losses and metrics: sizes, conventions, precision, learning."""

from dataclasses import fields

import mindspore
import numpy as np
import pytest
from mindspore import Parameter, Tensor, float32, nn, ops

from model import native
from model.backend import Backend
from model.inference import FlowPredictor
from model.losses import LEVEL_WEIGHTS, MultiScaleLoss, make_loss
from model.precision import set_precision
from model.pwcnet import DIV_FLOW, PWCNet, start_from_coarser_flow
from model.resizing import resize, upsample
from prep.reader import Batch
from prep.synthesis.version1 import make_pair
from train.metrics import end_point_error
from train.recipe import Recipe
from train.step import TrainStep
from train.update import StepOptions

pytestmark = pytest.mark.usefixtures("graph_mode")


@pytest.fixture(scope="module")
def pair() -> Batch:
    """One synthetic pair as a batch: two images uint8, flow float32, valid uint8."""
    image1, image2, flow, _ = make_pair(3, 64, 64)
    valid = np.ones((64, 64), np.uint8)
    return Batch(*(array[None] for array in (image1, image2, flow, valid)), index=np.array([0], np.int32))


def test_parameters_are_those_of_the_published_network() -> None:
    """Count, names and shapes."""
    names = {p.name: p.shape for p in PWCNet().get_parameters()}
    assert sum(np.prod(shape) for shape in names.values()) == 8_639_230
    assert names["feature_pyramid_extractor.convs.5.1.0.weight"] == (196, 196, 3, 3)
    assert names["flow_estimators.0.conv1.0.weight"] == (128, 81, 3, 3)
    assert names["flow_estimators.4.conv1.0.weight"] == (128, 81 + 32 + 2, 3, 3)
    assert names["flow_estimators.4.conv_last.0.weight"] == (2, 81 + 32 + 2 + 448, 3, 3)
    assert names["context_networks.convs.0.0.weight"] == (128, 565, 3, 3)
    assert names["context_networks.convs.6.0.bias"] == (2,)


def test_plain_estimators_are_smaller() -> None:
    """The plain network replaces features where the dense one collects them."""
    shapes = {p.name: p.shape for p in PWCNet(dense=False).get_parameters()}
    assert shapes["flow_estimators.4.conv2.0.weight"] == (128, 128, 3, 3)
    assert shapes["context_networks.convs.0.0.weight"] == (128, 34, 3, 3)


def test_levels_start_from_the_coarser_flow() -> None:
    """Without their random weights, all levels pass on the first one's flow unchanged."""
    mindspore.set_seed(0)
    network = PWCNet()
    start_from_coarser_flow(network, share=0.0)
    bias = network.flow_estimators[0].conv_last[0].bias
    bias.set_data(Tensor(np.array([0.3, -0.7], np.float32)))
    images = Tensor(np.random.default_rng(0).random((2, 1, 3, 64, 64), np.float32))
    for flow in network(images[0], images[1]):
        expected = np.broadcast_to(np.array([0.3, -0.7], np.float32)[:, None, None], flow.shape[1:])
        np.testing.assert_allclose(flow.asnumpy()[0], expected, rtol=1e-5)


def test_upsampling_starts_as_a_bilinear_one() -> None:
    """A learnt upsampling doubles a ramp between pixel centres, away from the edge."""
    network = PWCNet("nvlabs")
    start_from_coarser_flow(network)
    y, x = np.mgrid[:8, :8].astype(np.float32)
    ramp = np.stack([x + 2 * y, 3 - x])[None]
    fine = network.upsamplings[0].flow(Tensor(ramp)).asnumpy()[0, :, 1:-1, 1:-1]
    y, x = (np.mgrid[:16, :16].astype(np.float32)[:, 1:-1, 1:-1] - 0.5) / 2
    np.testing.assert_allclose(fine, [x + 2 * y, 3 - x], atol=1e-5)


def test_flow_of_every_level_and_of_any_size() -> None:
    """Five flows coarse to fine in training; a flow of the images' own size in use."""
    mindspore.set_seed(0)
    network = PWCNet(dense=False)
    rng = np.random.default_rng(0)
    images = Tensor(rng.random((2, 1, 3, 64, 128), np.float32))
    flows = network(images[0], images[1])
    assert [flow.shape for flow in flows] == [(1, 2, 64 >> level, 128 >> level) for level in (6, 5, 4, 3, 2)]
    odd = rng.integers(0, 256, (2, 65, 90, 3), np.uint8)
    assert FlowPredictor(network).flow(*odd).shape == (65, 90, 2)


def test_resizing_scales_the_flow() -> None:
    """Images resized to multiples of 64 give flow in the pixels of the images that came in."""

    class Constant(nn.Cell):
        def construct(self, image1: Tensor, image2: Tensor) -> Tensor:
            n, _, h, w = image1.shape
            shape = (n, 1, h // 4, w // 4)
            return (ops.concat((ops.ones(shape), 2 * ops.ones(shape)), 1) * DIV_FLOW,)

    image = np.zeros((48, 96, 3), np.uint8)
    flow = FlowPredictor(Constant()).flow(image, image)
    np.testing.assert_allclose(flow, np.broadcast_to([96 / 128, 2 * 48 / 64], flow.shape), rtol=1e-5)


def test_loss_equals_a_calculation_by_hand() -> None:
    """Level weights, sum over pixels, division by the batch, target times 0.05, both distances."""
    flow = np.zeros((2, 2, 64, 64), np.float32)
    flow[:, 0], flow[:, 1] = 60, 80  # 100 px, 5 in the network's units
    valid = np.ones((2, 1, 64, 64), np.float32)
    flows = [Tensor(np.zeros((2, 2, 64 >> level, 64 >> level), np.float32)) for level in (6, 5, 4, 3, 2)]
    pixels = np.array([1, 4, 16, 64, 256])
    losses = MultiScaleLoss()(flows, Tensor(flow), Tensor(valid)).asnumpy()
    np.testing.assert_allclose(losses, LEVEL_WEIGHTS * pixels * 5, rtol=1e-5)
    robust = MultiScaleLoss(robust=True)(flows, Tensor(flow), Tensor(valid)).asnumpy()
    np.testing.assert_allclose(robust, LEVEL_WEIGHTS * pixels * 7.01**0.4, rtol=1e-5)


def test_unknown_flow_never_counts() -> None:
    """Whatever stands where flow is unknown, even NaN, leaves targets, loss and EPE as they are."""
    rng = np.random.default_rng(0)
    flow = rng.normal(0, 9, (1, 2, 64, 64)).astype(np.float32)
    valid = (rng.random((1, 1, 64, 64)) < 0.5).astype(np.float32)
    valid[:, :, :4, :4] = 0  # a whole block of the finest level
    spoilt = np.where(valid > 0, flow, np.float32(np.nan))
    flows = [Tensor(np.zeros((1, 2, 64 >> level, 64 >> level), np.float32)) for level in (6, 5, 4, 3, 2)]
    losses = [MultiScaleLoss()(flows, Tensor(f), Tensor(valid)).asnumpy() for f in (flow, spoilt)]
    np.testing.assert_array_equal(*losses)
    for level, weight, loss in zip((6, 5, 4, 3, 2), LEVEL_WEIGHTS, losses[0], strict=True):
        blocks = (64 >> level, 1 << level, 64 >> level, 1 << level)
        known, count = (a.reshape(-1, *blocks).sum((2, 4)) for a in (flow[0] * valid[0], valid[0]))
        targets = known[:, count[0] > 0] / count[:, count[0] > 0]
        np.testing.assert_allclose(loss, weight * 0.05 * np.linalg.norm(targets, axis=0).sum(), rtol=1e-5)


def sparse_batch(height: int, width: int, known: float = 0.2) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Predictions of five levels, flow with rubbish where it is unknown, and where it is known."""
    rng = np.random.default_rng(height)
    flows = [rng.normal(0, 1, (2, 2, height >> level, width >> level)).astype(np.float32) for level in (6, 5, 4, 3, 2)]
    flow = rng.normal(0, 20, (2, 2, height, width)).astype(np.float32)
    valid = (rng.random((2, 1, height, width)) < known).astype(np.float32)
    rubbish = rng.choice(np.array([np.nan, np.inf, -np.inf, 3e38, 7], np.float32), flow.shape)
    return flows, np.where(valid > 0, flow, rubbish), valid


def upsample_in_float64(image: np.ndarray, height: int, width: int, align_corners: bool) -> np.ndarray:
    """Bilinear interpolation of (N, C, h, w), pixel by pixel, from the definition."""
    for axis, size in ((2, height), (3, width)):
        low = image.shape[axis]
        scale = (low - 1) / (size - 1) if align_corners else low / size
        lines = []
        for pixel in range(size):
            place = pixel * scale if align_corners else (pixel + 0.5) * scale - 0.5
            place = min(max(place, 0), low - 1)
            first = int(place)
            second = min(first + 1, low - 1)
            lines.append(image.take(first, axis) * (1 - place + first) + image.take(second, axis) * (place - first))
        image = np.stack(lines, axis)
    return image


def sparse_loss_in_float64(
    flows: list[np.ndarray], flow: np.ndarray, valid: np.ndarray, align_corners: bool
) -> np.ndarray:
    """The five losses from the equation, over a list of the known pixels."""
    n, y, x = np.nonzero(valid[:, 0])
    losses = []
    for weight, prediction in zip(LEVEL_WEIGHTS, flows, strict=True):
        full = upsample_in_float64(prediction.astype(np.float64), flow.shape[2], flow.shape[3], align_corners)
        distance = np.abs(full[n, :, y, x] - 0.05 * flow[n, :, y, x].astype(np.float64)).sum(1)
        losses.append(weight * ((distance + 0.01) ** 0.4).sum() / len(flow))
    return np.array(losses)


@pytest.mark.parametrize("align_corners", [True, False])
def test_sparse_loss_and_gradient_follow_the_equation(align_corners: bool) -> None:
    """Values are the equation's, slopes those of its differences; unknown flow may be anything."""
    flows, flow, valid = sparse_batch(64, 128)
    loss = make_loss("sparse", align_corners)
    losses = loss([Tensor(f) for f in flows], Tensor(flow), Tensor(valid)).asnumpy()
    np.testing.assert_allclose(losses, sparse_loss_in_float64(flows, flow, valid, align_corners), rtol=1e-5)

    def total(*inputs: Tensor) -> Tensor:
        return loss(inputs[:5], inputs[5], inputs[6]).sum()

    gradients = mindspore.grad(total, (0, 1, 2, 3, 4))(*[Tensor(array) for array in (*flows, flow, valid)])
    rng = np.random.default_rng(0)
    for level, gradient in enumerate(gradients):
        assert np.isfinite(gradient.asnumpy()).all()
        direction = rng.choice([-1.0, 1.0], flows[level].shape)
        ends = []
        for step in (1e-6, -1e-6):
            moved = [f.astype(np.float64) for f in flows]
            moved[level] += step * direction
            ends.append(sparse_loss_in_float64(moved, flow, valid, align_corners).sum())
        slope = (ends[0] - ends[1]) / 2e-6
        size = np.abs(gradient.asnumpy()).sum()
        assert (gradient.asnumpy() * direction).sum() == pytest.approx(slope, abs=1e-4 * size)


@pytest.mark.parametrize("name", ["multiscale", "robust", "sparse"])
def test_a_loss_without_any_known_pixel_is_zero(name: str) -> None:
    """A crop of the sky, or a batch without ground truth, has neither loss nor gradient, and no NaN."""
    flows, flow, valid = sparse_batch(64, 64, known=0)
    arguments = [Tensor(array) for array in (*flows, flow, valid)]
    loss = make_loss(name)

    def total(*inputs: Tensor) -> Tensor:
        return loss(inputs[:5], inputs[5], inputs[6]).sum()

    value, gradients = mindspore.value_and_grad(total, (0, 1, 2, 3, 4))(*arguments)
    assert float(value) == 0 and all((g.asnumpy() == 0).all() for g in gradients)


def test_each_loss_of_a_recipe_is_another_one() -> None:
    """Each loss that a recipe may name is another one; a wrong name is not taken for any."""
    choices = {field.name: field.metadata for field in fields(Recipe)}["loss"]["limits"].choices
    arguments = [Tensor(array) for array in sparse_batch(64, 64)[1:]]
    flows = [Tensor(f) for f in sparse_batch(64, 64)[0]]
    totals = {float(make_loss(name)(flows, *arguments).sum()) for name in choices}
    assert len(totals) == len(choices) == 3
    with pytest.raises(ValueError, match="loss is 'Robust', expected multiscale, robust or sparse"):
        make_loss("Robust")


def test_levels_contribute_to_the_sparse_loss_by_their_weights() -> None:
    """Equal errors; block averages of sparse flow would reverse the order."""
    rng = np.random.default_rng(0)
    flow = Tensor(np.full((1, 2, 320, 896), 100, np.float32))
    valid = Tensor((rng.random((1, 1, 320, 896)) < 0.2).astype(np.float32))
    flows = [Tensor(np.zeros((1, 2, 320 >> level, 896 >> level), np.float32)) for level in (6, 5, 4, 3, 2)]
    shares = {}
    for name in ("sparse", "robust"):
        losses = make_loss(name)(flows, flow, valid).asnumpy()
        shares[name] = losses / losses.sum()
    np.testing.assert_allclose(shares["sparse"], np.divide(LEVEL_WEIGHTS, sum(LEVEL_WEIGHTS)), rtol=1e-4)
    assert shares["sparse"][0] > 0.73 and shares["sparse"][-1] < 0.012
    assert shares["robust"][-1] > 0.4


@pytest.mark.parametrize("align_corners", [True, False])
def test_upsampling_is_that_of_the_framework(align_corners: bool) -> None:
    """The same bilinear convention that the network's own result is resized with."""
    flow = Tensor(np.random.default_rng(0).normal(size=(2, 2, 5, 14)).astype(np.float32))
    expected = resize(flow, (320, 896), align_corners).asnumpy()
    np.testing.assert_allclose(upsample(flow, 320, 896, align_corners).asnumpy(), expected, atol=1e-5)


def test_end_point_error_is_a_euclidean_distance() -> None:
    assert end_point_error(np.array([[3.0, 4.0]]), np.zeros((1, 2), np.float32)) == [5]


def learn(step: TrainStep, pair: Batch, steps: int) -> list[float]:
    """Losses of so many steps on one pair."""
    return [float(step(pair, 3e-4).losses.sum()) for _ in range(steps)]


@pytest.mark.slow
def test_overfitting_one_pair(pair: Batch) -> None:
    """The whole network learns one pair by heart."""
    mindspore.set_seed(1)
    network = PWCNet(normalize_features=True)
    losses = learn(TrainStep(network, MultiScaleLoss(), StepOptions(clip_norm=1.0)), pair, 20)
    assert np.mean(losses[-5:]) < 0.4 * np.mean(losses[:5])


class Line(nn.Cell):
    """A network of one row of weights, whose flow is the first image's mean times their sum."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.backend = backend
        self.weight = Parameter(Tensor([2.0, -4.0], float32), name="weight")

    def construct(self, image1: Tensor, image2: Tensor) -> Tensor:
        return image1.mean() * self.weight.sum()


class Square(nn.Cell):
    """A loss of one number, the squared distance to the flow's mean."""

    length = 1

    def construct(self, flows: Tensor, flow: Tensor, valid: Tensor) -> Tensor:
        return ops.square(flows - flow.mean()).reshape(1)


def small_batch(images: list[float], flows: list[float]) -> Batch:
    """A batch of constant images and flows, one of each number."""

    def fill(values: np.ndarray, *shape: int) -> np.ndarray:
        return np.tile(np.reshape(values, (-1, *[1] * len(shape))), (1, *shape))

    image = fill(np.array(images, np.uint8), 4, 4, 3)
    valid = np.ones((len(images), 4, 4), np.uint8)
    index = np.arange(len(images), dtype=np.int32)
    return Batch(image, image, fill(np.array(flows, np.float32), 4, 4, 2), valid, index)


@pytest.fixture(params=["native", "mindspore"])
def backend(request: pytest.FixtureRequest, graph_mode: None) -> Backend:
    """How weights are updated: by the project's own function or by a graph."""
    if request.param == "native" and not native.available():
        pytest.skip("there is no compiler here")
    return request.param


def test_steps_follow_the_equations_of_adam_and_adamw(backend: Backend) -> None:
    """Weights and their average follow the papers' equations, computed here in float64."""
    for options in (
        StepOptions(),
        StepOptions(weight_decay=0.3, clip_norm=0.5),
        StepOptions(weight_decay=0.3, decoupled_decay=True, ema_decay=0.75),
    ):
        network = Line(backend)
        step = TrainStep(network, Square(), options)
        weight = average = np.array([2.0, -4.0])
        moment1, moment2 = np.zeros(2), np.zeros(2)
        for t, rate in enumerate((0.1, 0.2, 0.05), 1):
            if options.ema_decay and t > 1:
                own = network.weight.asnumpy().copy()
                with step.averaged_weights():
                    np.testing.assert_allclose(network.weight.asnumpy(), average, rtol=1e-4)
                np.testing.assert_array_equal(network.weight.asnumpy(), own)
            losses, norm, finite = step(small_batch([51 * t], [t]), rate)
            error = 0.2 * t * weight.sum() - t
            gradient = 2 * error * 0.2 * t * np.ones(2)
            assert float(losses[0]) == pytest.approx(error**2, rel=1e-4)
            assert float(norm) == pytest.approx(np.linalg.norm(gradient), rel=1e-4) and finite
            if options.clip_norm:
                gradient *= min(1, options.clip_norm / np.linalg.norm(gradient))
            decay = options.weight_decay * weight
            if not options.decoupled_decay:
                gradient, decay = gradient + decay, 0
            moment1 = 0.9 * moment1 + 0.1 * gradient
            moment2 = 0.999 * moment2 + 0.001 * gradient**2
            bias1, bias2 = 1 - 0.9**t, 1 - 0.999**t
            weight = weight - rate * (moment1 / bias1 / (np.sqrt(moment2 / bias2) + 1e-8) + decay)
            average = 0.75 * average + 0.25 * weight
            np.testing.assert_allclose(network.weight.asnumpy(), weight, rtol=1e-4, err_msg=str(options))


def test_an_update_of_many_weights_is_one_of_each(backend: Backend) -> None:
    """Weights of all lengths change as one vector does; clipping is by the norm of all; the sum is cleared."""
    rng = np.random.default_rng(0)
    network = nn.Cell()
    network.backend = backend
    sizes = (3, 40_000, 16_384, 1)
    for number, size in enumerate(sizes):
        network.insert_param_to_cell(f"w{number}", Parameter(Tensor(rng.normal(size=size), float32), name=f"w{number}"))
    step = TrainStep(network, Square(), StepOptions(clip_norm=1.0, weight_decay=0.1, accumulation_steps=2))
    before = np.concatenate([weight.asnumpy() for weight in step.weights])
    gradient = rng.normal(size=sum(sizes)).astype(np.float32)
    step.sums[1].set_data(Tensor(2 * gradient))
    _, norm, finite = step.do_update(0.01)
    assert finite and norm == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    slope = gradient / norm + 0.1 * before
    after = np.concatenate([weight.asnumpy() for weight in step.weights])
    np.testing.assert_allclose(after, before - 0.01 * slope / (np.abs(slope) + 1e-8 / 0.001**0.5), atol=1e-5)
    assert not step.sums[1].asnumpy().any()


def test_accumulation_steps_equal_one_step(backend: Backend) -> None:
    """Several passes make the same update as one with the whole batch."""
    weights = []
    losses = norm = Tensor(0.0)
    for parts in (1, 3):
        network = Line(backend)
        step = TrainStep(network, Square(), StepOptions(accumulation_steps=parts, clip_norm=0.5))
        for t in range(1, 4):
            # Of one flow each: the mean over the batch is the mean over its parts.
            losses, norm, _ = step(small_batch([10 * t] * 3, [t] * 3), 0.1)
        weights.append([*network.weight.asnumpy(), float(losses[0]), float(norm)])
    np.testing.assert_allclose(*weights, rtol=1e-5)
    network = Line(backend)
    step = TrainStep(network, Square(), StepOptions(accumulation_steps=2))
    losses, norm, _ = step(small_batch([51, 102], [1, 3]), 0.1)
    errors = np.array([0.2, 0.4]) * -2 - [1, 3]
    assert float(losses[0]) == pytest.approx(np.mean(errors**2), rel=1e-4)
    slope = np.mean(2 * errors * [0.2, 0.4])
    assert float(norm) == pytest.approx(abs(slope) * 2**0.5, rel=1e-4)


@pytest.mark.slow
def test_float16_learns_and_survives_overflow(pair: Batch) -> None:
    """It learns in float16 too; a gradient that overflows changes no weight and halves the scale."""
    mindspore.set_seed(1)
    network = PWCNet(dense=False, normalize_features=True)
    set_precision(network, "float16")
    step = TrainStep(network, MultiScaleLoss(), StepOptions(clip_norm=1.0, loss_scaling=True))
    losses = learn(step, pair, 12)
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])

    before = [p.asnumpy().copy() for p in network.get_parameters()]
    scale = step.loss_scale
    step.state.loss_scale.set_data(Tensor(np.float32(3e38)))
    assert not step(pair, 3e-4).finite
    for old, new in zip(before, network.get_parameters(), strict=True):
        np.testing.assert_array_equal(old, new.asnumpy())
    assert step.loss_scale == pytest.approx(1.5e38)
    step.state.loss_scale.set_data(Tensor(np.float32(scale)))
    assert step(pair, 3e-4).finite
    assert any((old != new.asnumpy()).any() for old, new in zip(before, network.get_parameters(), strict=True))


@pytest.mark.slow
def test_the_second_variant_learns(pair: Batch) -> None:
    """A training step changes every parameter: gradients reach them all."""
    mindspore.set_seed(0)
    network = PWCNet("nvlabs", normalize_features=True)
    before = {p.name: p.asnumpy().copy() for p in network.get_parameters()}
    step = TrainStep(network, MultiScaleLoss())
    losses, norm, finite = step(pair, 1e-3)
    assert finite and np.isfinite(losses.asnumpy()).all() and float(norm) > 0
    same = [p.name for p in network.get_parameters() if np.array_equal(before[p.name], p.asnumpy())]
    assert not same
