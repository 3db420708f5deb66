"""The network against independent oracles.

What the model computes is computed again here, another way: naive loops in float64, hand-worked numbers, or the plain
formulation (concatenate and convolve), and every backbone a second time from nothing but its weights file.

Shapes: B batch, K shots, C channels, D prototype channels, (H, W) image, (h, w) features.
"""

import hashlib
import math
import re
import tempfile
from functools import partial
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from authors import authors_forward, authors_head
from pfenet import (
    NaiveResNet,
    NaiveVGG,
    batch_norm,
    bilinear,
    conv2d,
    difference,
    episode,
    expand_to,
    hollow_state,
    pfenet,
    pfenet_fem,
    pfenet_head,
    random_state,
    resnet_shapes,
    to_our_names,
    vgg_shapes,
)
from torch import nn

from model.backbone import build_backbone
from model.bgem import BGEM
from model.bgmm import BGMM
from model.doem import mine_distracting_objects
from model.fem import FEM
from model.losses import NTRELoss, target_loss
from model.matching import FeatureMatching
from model.ntrenet import build_ntrenet
from model.ops import concat_conv, foreground, masked_average_pool, resize
from model.parallel import Dropout2d
from model.prior import prior_mask, target_positions
from model.prototype_bank import PrototypeBank
from model.weights import WeightsError
from tests.plain import plain_forward

PASCAL_BINS, COCO_BINS = (60, 30, 15, 8), (1.0, 0.5, 0.25, 0.125)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def array(tensor):
    return tensor.detach().numpy().astype(np.float64)


# ---------------------------------------------------------------------------------------------------------------------
# ops
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(5, 8), (2, 2)])
@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("prototypes", [1, 3])
@pytest.mark.parametrize("kernel", [1, 3])
def test_concat_conv_and_its_gradients_equal_convolving_the_concatenation(kernel, prototypes, with_prior, size):
    batch, channels, dim = 3, 4, 6
    conv = nn.Conv2d(channels + dim + with_prior, 5, kernel, padding=kernel // 2).double()
    feature = torch.randn(batch, channels, *size, dtype=torch.double, requires_grad=True)
    prototype = torch.randn(prototypes, dim, 1, 1, dtype=torch.double, requires_grad=True)
    prior = torch.rand(batch, 1, *size, dtype=torch.double, requires_grad=True) if with_prior else None
    inputs = [feature, prototype, *([prior] if with_prior else []), *conv.parameters()]
    parts = [feature, prototype.expand(batch, dim, *size), *([prior] if with_prior else [])]

    expected = conv(torch.cat(parts, 1))
    got = concat_conv(conv, feature, prototype, prior)

    assert torch.allclose(got, expected, atol=1e-12)
    weights = torch.randn_like(expected)
    wanted_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    gradients = torch.autograd.grad((got * weights).sum(), inputs)
    for gradient, wanted in zip(gradients, wanted_gradients, strict=True):
        assert torch.allclose(gradient, wanted, atol=1e-11)


def test_concat_conv_refuses_a_convolution_for_another_number_of_channels():
    feature, prototype, prior = torch.randn(1, 2, 4, 4), torch.randn(1, 3, 1, 1), torch.randn(1, 1, 4, 4)
    with pytest.raises(ValueError, match="6 channels"):
        concat_conv(nn.Conv2d(6, 2, 1), feature, prototype)
    with pytest.raises(ValueError, match="5 channels"):
        concat_conv(nn.Conv2d(5, 2, 1), feature, prototype, prior)


def test_masked_average_pool_equals_a_loop_over_positions():
    feature, mask = torch.randn(2, 3, 4, 5), torch.rand(2, 1, 4, 5)
    mask[mask < 0.3] = 0
    x, m = array(feature), array(mask)
    for n in range(2):
        for c in range(3):
            total = area = 0.0
            for i in range(4):
                for j in range(5):
                    total += x[n, c, i, j] * m[n, 0, i, j]
                    area += m[n, 0, i, j]
            assert masked_average_pool(feature, mask)[n, c, 0, 0].item() == pytest.approx(total / area, abs=1e-6)


def test_masked_average_pool_of_an_empty_mask_is_zero_with_finite_gradient():
    feature = torch.randn(2, 3, 4, 4, requires_grad=True)
    pooled = masked_average_pool(feature, torch.zeros(2, 1, 4, 4))
    pooled.sum().backward()
    assert pooled.shape == (2, 3, 1, 1)
    assert (pooled == 0).all()
    assert (feature.grad == 0).all()


def test_masked_average_pool_of_half_precision_sums_beyond_the_range_of_half_precision():
    feature = torch.full((1, 1, 300, 300), 3.0, dtype=torch.half)  # sums to 270,000; float16 ends at 65,504
    assert masked_average_pool(feature, torch.ones(1, 1, 300, 300, dtype=torch.half)).item() == 3.0


@pytest.mark.parametrize("size", [(65, 65), (49, 33), (161, 473)])
def test_foreground_at_8n_plus_1_pixels_is_every_eighth_pixel(size):
    masks = torch.randint(0, 2, (2, *size))
    masks[torch.rand(2, *size) < 0.2] = 255
    expected = (masks[:, ::8, ::8] == 1).float().unsqueeze(1)
    got = foreground(masks, ((size[0] - 1) // 8 + 1, (size[1] - 1) // 8 + 1))
    assert torch.equal(got, expected)


def test_resize_aligns_corners():
    ramp = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    assert resize(ramp, (3, 3))[0, 0].tolist() == [[0, 0.5, 1], [1, 1.5, 2], [2, 2.5, 3]]


# ---------------------------------------------------------------------------------------------------------------------
# prior
# ---------------------------------------------------------------------------------------------------------------------


def naive_prior(query, supports):
    """(C, h, w), list of (C, h, w) -> (h, w): cosine, maximum over support, min-max over query, mean over shots."""
    height, width = query.shape[1:]
    maps = []
    for support in supports:
        best = np.empty((height, width))
        for i in range(height):
            for j in range(width):
                q = query[:, i, j]
                cosines = []
                for k in range(support.shape[1]):
                    for m in range(support.shape[2]):
                        s = support[:, k, m]
                        norms = math.sqrt(sum(v * v for v in q)) * math.sqrt(sum(v * v for v in s))
                        cosines.append(sum(a * b for a, b in zip(q, s, strict=True)) / norms if norms else 0.0)
                best[i, j] = max(cosines)
        span = best.max() - best.min()
        maps.append((best - best.min()) / span if span else best * 0)
    return sum(maps) / len(maps)


def positions(support):
    """(B, K, C, h, w) -> (B, K, hw, C)"""
    return support.flatten(3).transpose(2, 3)


@pytest.mark.parametrize("shots", [1, 3])
def test_prior_equals_a_double_loop_over_query_and_support_positions(shots):
    query, support = torch.randn(2, 4, 3, 5), torch.randn(2, shots, 4, 3, 5)
    support *= (torch.rand(2, shots, 1, 3, 5) < 0.6).float()
    prior = prior_mask(query, positions(support))
    assert prior.shape == (2, 1, 3, 5)
    for b in range(2):
        expected = naive_prior(array(query[b]), list(array(support[b])))
        assert np.abs(array(prior[b, 0]) - expected).max() < 1e-5


class NoBackbone:
    """Stage 4 is the identity."""

    def high_within(self, stage3, rows, columns):
        return stage3[:, :, rows, columns]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_target_positions_give_the_prior_of_the_whole_zeroed_map(share):
    """Whole supports and empty ones included: a zero beside the target may win where all cosines are negative."""
    query, high = torch.randn(3, 4, 5, 6), torch.randn(6, 4, 5, 6)
    target = torch.rand(6, 1, 5, 6) * (torch.rand(6, 1, 5, 6) < share)
    target[0] = 1  # another support of the batch keeps every position
    target[1] = 0
    some = target_positions(NoBackbone(), high, target)
    expected = prior_mask(query, positions((high * target * target).unflatten(0, (3, 2))))
    assert torch.allclose(prior_mask(query, some.unflatten(0, (3, 2))), expected, atol=1e-5)
    few = target_positions(NoBackbone(), high[2:], target[2:])
    assert few.shape[1] == min(int((target[2:] > 0).sum((1, 2, 3)).max()) + 1, 30)
    assert torch.allclose(prior_mask(query[1:], few.unflatten(0, (2, 2))), expected[1:], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet50", "vgg16_bn", "efficientnet_lite0"])
def test_stage_4_within_a_window_is_that_part_of_the_whole(name):
    torch.manual_seed(0)
    backbone, _ = build_backbone(name, weights="random")
    for module in backbone.stage4.modules():
        if isinstance(module, nn.BatchNorm2d):  # positions whose input is zero are not zero after it
            nn.init.normal_(module.bias)
    channels = backbone(torch.zeros(1, 3, 33, 33)).stage3.shape[1]
    stage3 = torch.randn(1, channels, 40, 36)
    whole = backbone.high(stage3)
    for window in ((0, 1, 0, 1), (7, 12, 20, 23), (0, 40, 0, 36), (39, 40, 2, 36), (15, 25, 0, 4)):
        rows, columns = slice(*window[:2]), slice(*window[2:])
        part = backbone.high_within(stage3, rows, columns)
        assert part.shape == whole[:, :, rows, columns].shape
        assert (part - whole[:, :, rows, columns]).abs().max() < 1e-4 * whole.abs().max()


@torch.no_grad()
def test_windows_of_all_sizes_are_exact_and_meet_few_shapes():
    torch.manual_seed(0)
    backbone, _ = build_backbone("efficientnet_lite0", weights="random")
    backbone.fold_batch_norm()
    seen = set()
    for place, block in enumerate(backbone.stage4):
        block.register_forward_pre_hook(lambda _, args, place=place: seen.add((place, *args[0].shape[-2:])))
    channels = backbone(torch.zeros(1, 3, 33, 33)).stage3.shape[1]
    stage3 = torch.randn(1, channels, 24, 31)
    whole = backbone.high(stage3)
    seen.clear()
    random = np.random.default_rng(0)
    for _ in range(400):
        (top, bottom), (left, right) = (sorted(random.choice(n + 1, 2, replace=False).tolist()) for n in (24, 31))
        part = backbone.high_within(stage3, slice(top, bottom), slice(left, right))
        assert (part - whole[:, :, top:bottom, left:right]).abs().max() < 1e-4 * whole.abs().max()
    assert len(seen) <= len(backbone.stage4) * 8 * 8


# ---------------------------------------------------------------------------------------------------------------------
# the boxes: BGMM, BGEM, FM, DOEM
# ---------------------------------------------------------------------------------------------------------------------


def naive_conv(x, weight, bias=None):
    """Stride 1, zero padding that keeps the size: (N, C, h, w), (O, C, k, k) -> (N, O, h, w)."""
    kernel = weight.shape[-1]
    padded = np.pad(x, ((0, 0), (0, 0), (kernel // 2,) * 2, (kernel // 2,) * 2))
    out = np.zeros((x.shape[0], weight.shape[0], *x.shape[2:]))
    for n, o, i, j in np.ndindex(*out.shape):
        out[n, o, i, j] = (padded[n, :, i : i + kernel, j : j + kernel] * weight[o]).sum()
        out[n, o, i, j] += 0 if bias is None else bias[o]
    return out


def naive_concat(feature, prototype, *maps):
    expanded = np.broadcast_to(prototype, (len(feature), prototype.shape[1], *feature.shape[2:]))
    return np.concatenate([feature, expanded, *maps], 1)


def relu(x):
    return np.maximum(x, 0)


def test_bgmm_is_two_3x3_convolutions_on_feature_and_background_prototype():
    bgmm, feature = BGMM(channels=3, prototype_channels=4), torch.randn(2, 3, 4, 5)
    nn.init.normal_(bgmm.prototype)
    w = {name: array(value) for name, value in bgmm.state_dict().items()}
    hidden = relu(naive_conv(naive_concat(array(feature), w["prototype"]), w["conv.weight"]))
    expected = naive_conv(hidden, w["classifier.weight"], w["classifier.bias"])
    assert expected.shape == (2, 1, 4, 5)
    assert np.abs(array(bgmm(feature)) - expected).max() < 1e-5


def test_background_prototype_is_drawn_from_a_normal_distribution():
    prototype = BGMM(channels=2, prototype_channels=640).prototype
    assert prototype.shape == (1, 640, 1, 1)
    assert prototype.requires_grad
    deviation = prototype.std().item()
    assert deviation > 0
    assert abs(prototype.mean().item()) < 0.2 * deviation
    for width, share in ((0.5, 0.383), (1, 0.683), (2, 0.954)):
        assert (prototype.abs() < width * deviation).float().mean().item() == pytest.approx(share, abs=0.06)


def test_bgem_is_a_1x1_convolution_on_feature_and_background_prototype():
    bgem, feature, prototype = BGEM(channels=3, prototype_channels=4), torch.randn(2, 3, 4, 5), torch.randn(1, 4, 1, 1)
    expected = relu(naive_conv(naive_concat(array(feature), array(prototype)), array(bgem.conv.weight)))
    assert np.abs(array(bgem(feature, prototype)) - expected).max() < 1e-5


def test_feature_matching_activates_with_prototype_and_prior_and_predicts():
    matching = FeatureMatching(channels=3)
    feature, prototype, prior = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 1, 1), torch.rand(2, 1, 4, 5)
    w = {name: array(value) for name, value in matching.state_dict().items()}
    activated = relu(naive_conv(naive_concat(array(feature), array(prototype), array(prior)), w["conv.weight"]))
    hidden = relu(naive_conv(activated, w["initial.0.weight"]))
    initial = naive_conv(hidden, w["initial.2.weight"], w["initial.2.bias"])
    got_activated, got_initial = matching(feature, prototype, prior)
    assert np.abs(array(got_activated) - activated).max() < 1e-5
    assert np.abs(array(got_initial) - initial).max() < 1e-5


def test_the_first_predictions_loss_shapes_x_act_only_where_asked_to():
    feature, prototype, prior = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 1, 1), torch.rand(2, 1, 4, 5)
    for detach in (True, False):
        matching = FeatureMatching(channels=3, detach_initial=detach)
        activated, initial = matching(feature, prototype, prior)
        initial.sum().backward()
        assert (matching.conv.weight.grad is None) == detach
        assert matching.initial[0].weight.grad is not None and activated.requires_grad


@pytest.mark.parametrize("average", ["region", "image"])
def test_doem_pools_what_is_neither_background_nor_target(average):
    feature = torch.tensor([[[[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], [[0.0, -3.0, 1.0], [5.0, 9.0, 100.0]]]])
    background = torch.tensor([[[[-1.0, -2.0, 3.0], [-0.1, 4.0, -9.0]]]])
    initial = torch.tensor([[[[-1.0, 5.0, 2.0], [-0.1, -4.0, -9.0]]]])
    mask, prototype = mine_distracting_objects(feature, background, initial, average)
    # background holds positions 2 and 4, the target 1 and 2: 0, 3 and 5 are left, three of six
    assert mask.tolist() == [[[[1, 0, 0], [1, 0, 1]]]]
    assert prototype.shape == (1, 2, 1, 1)
    positions = {"region": 3, "image": 6}[average]
    assert prototype.flatten().tolist() == pytest.approx([(1 + 8 + 32) / positions, (0 + 5 + 100) / positions])


@pytest.mark.parametrize("average", ["region", "image"])
def test_doem_without_distracting_objects_gives_a_zero_prototype_and_finite_gradients(average):
    feature = torch.randn(2, 3, 4, 4, requires_grad=True)
    background = torch.full((2, 1, 4, 4), -5.0)
    background[0] = 5.0  # the first episode is all background, the second has none
    mask, prototype = mine_distracting_objects(feature, background, torch.full((2, 1, 4, 4), -5.0), average)
    prototype.sum().backward()
    assert mask.flatten(1).sum(1).tolist() == [0, 16]
    assert (prototype[0] == 0).all()
    assert torch.allclose(prototype[1, :, 0, 0], feature[1].mean((1, 2)), atol=1e-6)
    assert feature.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# FEM against tests/pfenet.py: PFENet's names, two classes and plain concatenation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize(
    ("size", "scales"),
    [((9, 9), PASCAL_BINS), ((9, 9), COCO_BINS), ((17, 9), COCO_BINS), ((16, 16), (20, 8, 3)), ((6, 7), (1.0,))],
)
def test_fem_equals_pfenets_feature_enrichment(size, scales, with_prior):
    head = pfenet_head(4, scales, with_prior)
    fem = FEM(channels=4, scales=scales, with_prior=with_prior).eval()
    fem.load_state_dict(to_our_names(head))
    feature, prototype = torch.randn(2, 4, *size), torch.randn(2, 4, 1, 1)
    prior = torch.rand(2, 1, *size) if with_prior else None
    with torch.no_grad():
        expected, inner = pfenet_fem(head, feature, prototype, prior, scales)
        got = fem(feature, prototype, prior)
    assert expected.std() > 0.1
    assert torch.allclose(got.logits, difference(expected), atol=1e-4)
    assert len(got.scale_logits) == len(scales)
    for logits, wanted in zip(got.scale_logits, inner, strict=True):
        assert logits.shape == difference(wanted).shape
        assert torch.allclose(logits, difference(wanted), atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# backbones against tests/pfenet.py: functions of a weights file's state dict
# ---------------------------------------------------------------------------------------------------------------------


NAIVE = {"resnet50": NaiveResNet, "resnet50_deep": NaiveResNet, "vgg16_bn": NaiveVGG}
_loaded = {}


def random_backbone(kind):
    """A backbone loaded from a file, what the file held, and what was reported; built once."""
    if kind not in _loaded:
        torch.manual_seed(1)
        shapes = vgg_shapes() if kind == "vgg16_bn" else resnet_shapes(deep=kind.endswith("deep"))
        state = random_state(shapes)
        counters = [n.replace("running_mean", "num_batches_tracked") for n in state if n.endswith("running_mean")]
        extra = {} if kind.endswith("deep") else dict.fromkeys(counters, torch.tensor(7))  # old files lack them
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{kind}.pth"
            torch.save({**state, **extra}, path)
            backbone, info = build_backbone(kind.removesuffix("_deep"), weights=str(path))
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert info.source == str(path)
        assert info.sha256 == digest
        _loaded[kind] = backbone, state, info
    torch.manual_seed(0)
    return _loaded[kind]


@pytest.fixture(scope="module", autouse=True)
def forget_backbones():
    yield
    _loaded.clear()


@pytest.mark.parametrize(
    ("kind", "size"), [("resnet50", (33, 49)), ("resnet50_deep", (33, 33)), ("vgg16_bn", (65, 49))]
)
def test_backbone_features_equal_a_second_forward_written_from_the_weights_file(kind, size):
    backbone, state, _ = random_backbone(kind)
    naive, images = NAIVE[kind](state), torch.randn(2, 3, *size)
    with torch.no_grad():
        stage2, stage3 = naive.features(images)
        high = naive.high(stage3)
        got = backbone(images)
        got_high = backbone.high(got.stage3)
    for values in (stage2, stage3, high):
        assert 0.1 < values.std() < 20
    assert torch.allclose(got.stage3, stage3, atol=1e-4, rtol=1e-4)
    assert torch.allclose(got.middle, torch.cat([stage3, stage2], 1), atol=1e-4, rtol=1e-4)
    assert torch.allclose(got_high, high, atol=1e-4, rtol=1e-4)
    assert got.middle.shape[1] == backbone.middle_channels


@pytest.mark.parametrize(("kind", "stem"), [("resnet50", "standard"), ("resnet50_deep", "deep")])
def test_stem_of_a_resnet_file_is_recognised(kind, stem):
    backbone, _, info = random_backbone(kind)
    kernels = [m.kernel_size for m in backbone.stem if isinstance(m, nn.Conv2d)]
    assert info.stem == stem
    assert kernels == ([(3, 3)] * 3 if stem == "deep" else [(7, 7)])


def meta_backbone(name, **kwargs):
    """Without memory or arithmetic: shapes only."""
    with torch.device("meta"):
        return build_backbone(name, weights="random", **kwargs)[0]


@pytest.mark.parametrize(("name", "counts"), [("resnet50", (3, 4, 6, 3)), ("resnet101", (3, 4, 23, 3))])
def test_every_3x3_of_resnet_stages_3_and_4_is_dilated_and_no_stride_is_left(name, counts):
    backbone = meta_backbone(name)
    stages = (backbone.stage1, backbone.stage2, backbone.stage3, backbone.stage4)
    assert tuple(len(stage) for stage in stages) == counts
    for stage, dilation in ((backbone.stage3, 2), (backbone.stage4, 4)):
        convolutions = [m for m in stage.modules() if isinstance(m, nn.Conv2d)]
        assert all(m.stride == (1, 1) for m in convolutions)
        wide = [m for m in convolutions if m.kernel_size == (3, 3)]
        assert len(wide) == len(stage)
        assert all(m.dilation == m.padding == (dilation, dilation) for m in wide)


@pytest.mark.parametrize(
    ("name", "side", "middle_channels"),
    [("resnet50", 60, 1536), ("vgg16_bn", 30, 768), ("efficientnet_lite0", 60, 120)],
)
def test_features_of_the_papers_473_pixels_have_the_papers_side(name, side, middle_channels):
    backbone = meta_backbone(name)
    features = backbone(torch.empty(1, 3, 473, 473, device="meta"))
    assert features.middle.shape == (1, middle_channels, side, side)
    assert features.stage3.shape[-2:] == (side, side)
    assert backbone.high(features.stage3).shape[-2:] == (side, side)


# (expansion, stride, blocks) of the groups of EfficientNet-Lite0 used here; the published network has stride 2 in the
# fourth, which is dropped here
LITE0_GROUPS = ((1, 1, 1), (6, 2, 2), (6, 2, 2), (6, 1, 3), (6, 1, 3))


def same_conv(x, weight, *, stride=1, groups=1):
    """TensorFlow's "same": output ceil(n / stride), odd padding at the end."""
    pads = []
    for n in reversed(x.shape[-2:]):
        total = max((-(-n // stride) - 1) * stride + weight.shape[-1] - n, 0)
        pads += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)


def naive_lite0(state, x):
    """Features after each group."""

    def bn(name, y):
        return batch_norm(state, name, y, eps=1e-3)

    x = bn("_bn0", same_conv(x, state["_conv_stem.weight"], stride=2)).clamp(0, 6)
    n, after_group = 0, []
    for expansion, group_stride, blocks in LITE0_GROUPS:
        for i in range(blocks):
            block, y, stride = f"_blocks.{n}", x, group_stride if i == 0 else 1
            if expansion > 1:
                y = bn(f"{block}._bn0", same_conv(y, state[f"{block}._expand_conv.weight"])).clamp(0, 6)
            weight = state[f"{block}._depthwise_conv.weight"]
            y = same_conv(y, weight, stride=stride, groups=y.shape[1])
            y = bn(f"{block}._bn1", y).clamp(0, 6)
            y = bn(f"{block}._bn2", same_conv(y, state[f"{block}._project_conv.weight"]))
            x = x + y if i > 0 else y  # only the first block of a group changes channels or stride
            n += 1
        after_group.append(x)
    return after_group


@pytest.fixture(scope="module")
def lite0():
    backbone, info = build_backbone("efficientnet_lite0")
    return backbone, info


@pytest.mark.parametrize("size", [(65, 65), (97, 41)])
def test_efficientnet_features_equal_a_second_forward_written_from_the_weights_file(lite0, size):
    backbone, info = lite0
    state, images = torch.load(info.source, weights_only=True), torch.randn(2, 3, *size)
    with torch.no_grad():
        _, _, stage2, stage3, stage4 = naive_lite0(state, images)
        got = backbone(images)
        got_stage2 = backbone.stage2(backbone.stage1(backbone.stem(images)))
        got_high = backbone.high(got.stage3)
    assert stage2.shape[-2:] == ((size[0] + 7) // 8, (size[1] + 7) // 8)
    assert torch.allclose(got_stage2, stage2, atol=1e-3)
    assert torch.allclose(got.stage3, stage3, atol=1e-3)
    assert torch.allclose(got.middle, torch.cat([stage3, stage2], 1), atol=5e-3)
    assert torch.allclose(got_high, stage4, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# PFENet from the images on
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shots", "scales"),
    [("resnet50", 5, PASCAL_BINS), ("vgg16_bn", 1, COCO_BINS)],
)
def test_all_parts_off_is_pfenet(kind, shots, scales):
    backbone, state, _ = random_backbone(kind)
    head = pfenet_head(16, scales, True, backbone.middle_channels)
    model = build_ntrenet(backbone, bgem=False, doem=False, channels=16, fem_scales=scales).eval()
    ours = to_our_names(head, prefix="fem.")
    assert set(ours) == {name for name in model.state_dict() if not name.startswith("backbone.")}
    model.load_state_dict(ours, strict=False)
    side = 129 if kind == "vgg16_bn" else 65  # 9 x 9 positions at stride 16 and 8
    query, supports, masks = episode(1, shots, size=(side, side))
    with torch.no_grad():
        expected, prior, prototype, inner = pfenet(NAIVE[kind](state), head, query, supports, masks, scales)
        got = model(query, supports, masks)

    def agree(ours, theirs):  # relative: random weights give logits and prototypes of any size
        return (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()

    assert difference(expected).std() > 0.1 * difference(expected).abs().max()

    # PFENet's prototypes are smaller by 0.0005 / (area of the mask), and that is all
    assert agree(got.prior, prior)
    assert agree(got.support_prototype, prototype)
    for logits, wanted in zip(got.fem.scale_logits, inner, strict=True):
        assert agree(logits, difference(wanted))
    assert agree(got.logits, difference(expected))


# ---------------------------------------------------------------------------------------------------------------------
# the whole model
# ---------------------------------------------------------------------------------------------------------------------

ROWS = {  # Table 3: bgem, doem, pcl
    "pfenet": (False, False, False),
    "bgem": (True, False, False),
    "bgem+doem": (True, True, False),
    "bgem+doem+pcl": (True, True, True),
    "printed": (True, True, True),
    "per scale": (True, True, True),
    "authors": (True, True, True),
}
KINDS = {
    "printed": {"do_average": "region", "fem_prior": False, "do_similarity": False, "detach_initial": False},
    "per scale": {"elimination": "per_scale"},
    "authors": {"elimination": "authors"},
}
NETWORKS = ["pfenet", "bgem", "bgem+doem", *KINDS]


def network(lite0, row="bgem+doem", *, as_built=False, scales=(1, 0.5, 0.25)):
    """A row of the table in eval mode.

    Its weights are drawn here, lest a test hang on the model's initialisation, and every prediction's bias is set
    such that it says yes in 40 % of all positions, lest a region be empty.
    """
    bgem, doem, _ = ROWS[row]
    torch.manual_seed(2)
    model = build_ntrenet(
        lite0[0],
        bgem=bgem,
        doem=doem,
        **KINDS.get(row, {}),
        channels=8,
        prototype_channels=12,
        fem_scales=scales,
    ).eval()
    if not as_built:
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone."):
                fan_in = parameter[0].numel() if parameter.dim() == 4 and parameter.shape[0] > 1 else 1
                nn.init.normal_(parameter, std=math.sqrt(2 / fan_in) if fan_in > 1 else 0.5)
        with torch.no_grad():
            if model.bgmm is not None:
                balance(last_bias(model.bgmm.classifier), model, lambda out: out.query_bg_logits)
            for elimination in model.eliminations:
                balance(elimination.matching.initial[-1].bias, model, lambda out: out.eliminated[0].initial_logits)
            balance(model.fem.classifier[-1].bias, model, lambda out: out.fem.logits)
    torch.manual_seed(3)
    return model


def last_bias(module):
    return [part for part in module.modules() if isinstance(part, nn.Conv2d)][-1].bias


def balance(bias, model, prediction):
    torch.manual_seed(4)
    bias -= prediction(model(*episode(6, 1))).quantile(0.6)


def assert_same(got, expected, atol=1e-4):
    """Two outputs agree in every field that does not depend on the number of shots."""
    shots = {"support_features": None, "support_bg_logits": None}
    mine, theirs = tensors(got._replace(**shots)), tensors(expected._replace(**shots))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.allclose(value, theirs[name], atol=atol), name


def tensors(record, prefix=""):
    """Every tensor of an output by name, however deep."""
    if isinstance(record, torch.Tensor):
        return {prefix: record}
    fields = record._asdict() if hasattr(record, "_asdict") else dict(enumerate(record or ()))
    return {k: v for name, field in fields.items() for k, v in tensors(field, f"{prefix}.{name}").items()}


def plain_elimination(w, name, x_q, p_bg, y_bg, p_s, prior, *, eq_8=False):
    """Eq. 4 to 8 with everything expanded and concatenated: X_act, logits of y_ini, Y_DO, P_DO.

    Args:
        eq_8: P_DO as printed, divided by the area of Y_DO; else by that of the image.
    """
    x_bg = conv2d(w, f"{name}.bgem.conv", torch.cat([x_q, expand_to(p_bg, x_q)], 1)).relu()  # eq. 4
    x_act = conv2d(w, f"{name}.matching.conv", torch.cat([x_bg, expand_to(p_s, x_q), prior], 1)).relu()  # eq. 5
    hidden = conv2d(w, f"{name}.matching.initial.0", x_act).relu()
    y_ini = conv2d(w, f"{name}.matching.initial.2", hidden)  # eq. 6
    y_do = 1 - ((y_bg.sigmoid() > 0.5) | (y_ini.sigmoid() > 0.5)).float()  # eq. 7
    p_do = (x_q * y_do).mean((2, 3), keepdim=True)
    if eq_8:
        p_do = (x_q * y_do).sum((2, 3), keepdim=True) / y_do.sum((2, 3), keepdim=True).clamp_min(1e-6)
    return x_act, y_ini, y_do, p_do


@torch.no_grad()
@pytest.mark.parametrize("row", ["bgem+doem", "printed"])
def test_full_network_is_the_papers_equations_in_the_plain_formulation(lite0, row):
    scales, printed = (1.0, 0.5, 0.25), row == "printed"
    model = network(lite0, row)
    head = pfenet_head(8, scales, with_prior=not printed)
    model.fem.load_state_dict(to_our_names(head))
    query, supports, masks = episode(2, 3)
    out = model(query, supports, masks)
    w = model.state_dict()
    x_q, x_s = out.query_feature, out.support_features
    p_bg = w["bgmm.prototype"]

    target = (masks[:, :, ::8, ::8] == 1).float().unsqueeze(2)
    p_s = ((x_s * target).sum((3, 4)) / target.sum((3, 4))).mean(1)[:, :, None, None]

    def bgmm(x):  # eq. 1-2
        hidden = conv2d(w, "bgmm.conv", torch.cat([x, expand_to(p_bg, x)], 1)).relu()
        return conv2d(w, "bgmm.classifier", hidden)

    y_bg = bgmm(x_q)
    x_act, y_ini, y_do, p_do = plain_elimination(w, "eliminations.0", x_q, p_bg, y_bg, p_s, out.prior, eq_8=printed)
    cosine = (x_q * p_do).sum(1, keepdim=True) / (x_q.norm(dim=1, keepdim=True) * p_do.norm(dim=1, keepdim=True))
    evidence = None if printed else out.prior - torch.nan_to_num(cosine)
    y, inner = pfenet_fem(head, x_act, p_do, evidence, scales)  # eq. 9

    assert 0 < y_do[0].mean() < 1
    assert 0 < y_do[1].mean() < 1
    assert difference(y).std() > 0.1
    for got, expected in (
        (out.support_prototype, p_s),
        (out.query_bg_logits, y_bg),
        *zip(out.eliminated[0][1:], (y_ini, y_do, p_do), strict=True),
        (out.fem.logits, difference(y)),
        (out.logits, bilinear(difference(y), (65, 65))),
        *zip(out.fem.scale_logits, map(difference, inner), strict=True),
    ):
        assert got.shape == expected.shape
        assert torch.allclose(got, expected, atol=1e-4)
    for k in range(3):
        assert torch.allclose(out.support_bg_logits[:, k], bgmm(x_s[:, k]), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("scales", [(1.0, 0.5, 0.25), (0.5,)], ids=["three", "one, not the whole feature"])
def test_per_scale_elimination_is_eq_4_to_8_anew_at_each_of_fems_scales(lite0, scales):
    model = network(lite0, "per scale", scales=scales)
    head = pfenet_head(8, scales, with_prior=False)
    model.fem.load_state_dict(to_our_names(head))
    query, supports, masks = episode(2, 2)
    out = model(query, supports, masks)
    w, x_q, p_s = model.state_dict(), out.query_feature, out.support_prototype
    merged, initial, mined = [], [], []
    for i, share in enumerate(scales):
        side = (int(9 * share),) * 2
        inputs = F.adaptive_avg_pool2d(x_q, side), w["bgmm.prototype"], bilinear(out.query_bg_logits, side)
        x_act, y_ini, y_do, p_do = plain_elimination(w, f"eliminations.{i}", *inputs, p_s, bilinear(out.prior, side))
        merged.append((x_act, p_do, None))
        initial.append(y_ini)
        mined.append(y_do)
    assert any(0 < y_do.mean() < 1 for y_do in mined[-2:])  # not the finest alone finds distracting objects
    expected = model.fem.enrich(merged, (9, 9))
    assert expected.logits.std() > 0.1
    assert torch.allclose(out.fem.logits, expected.logits, atol=1e-4)
    for got, y_ini, y_do in zip(out.eliminated, initial, mined, strict=True):
        assert torch.allclose(got.initial_logits, y_ini, atol=1e-4)
        assert torch.equal(got.do_mask, y_do)
    query_masks = (torch.rand(2, 65, 65) < 0.3).long()
    loss = NTRELoss(bank=PrototypeBank(class_ids=range(1, 3), channels=8))
    terms = loss(out, query_masks, masks, torch.tensor([1, 2]))
    mean = sum(target_loss(y, query_masks).item() for y in initial) / len(initial)
    assert terms["initial"].item() == pytest.approx(mean, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("shots", "scales"), [(1, PASCAL_BINS), (5, COCO_BINS)])
def test_authors_elimination_is_the_authors_network(lite0, scales, shots):
    model = build_ntrenet(lite0[0], elimination="authors", channels=8, prototype_channels=8, fem_scales=scales).eval()
    assert (model.bgmm.prototype == 0).all()
    head = authors_head(8, scales)
    named = {name: value for name, value in head.items() if name != "p_bg"}
    ours = {"bgmm.prototype": head["p_bg"]} | to_our_names(named, prefix="fem.")
    assert set(ours) == {n for n in model.state_dict() if not n.startswith(("backbone.", "reduce_"))}
    model.load_state_dict(ours, strict=False)
    out = model(*episode(2, shots, size=(129, 129)))
    inputs = out.query_feature, out.support_features, out.support_prototype, out.prior
    y, bg_q, bg_s, initial, inner = authors_forward(head, *inputs, scales)
    assert difference(y).std() > 0.1
    assert 0 < out.eliminated[0].do_mask.mean() < 1
    assert torch.allclose(out.support_bg_logits, bg_s[:, :, 1:] - bg_s[:, :, :1], atol=1e-3)
    predictions = [
        out.fem.logits,
        out.query_bg_logits,
        *(e.initial_logits for e in out.eliminated),
        *out.fem.scale_logits,
    ]
    for got, expected in zip(predictions, (y, bg_q, *initial, *inner), strict=True):
        assert torch.allclose(got, difference(expected), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("row", NETWORKS)
@pytest.mark.parametrize("shots", [1, 3])
def test_every_ablation_equals_its_plain_formulation(lite0, row, shots):
    model = network(lite0, row)
    query, supports, masks = episode(2, shots)
    masks[0, 0] = 1  # a support that the target fills beside others that it does not
    got, expected = model(query, supports, masks), plain_forward(model, query, supports, masks)
    assert_same(got, expected)
    if got.support_bg_logits is not None:
        assert torch.allclose(got.support_bg_logits, expected.support_bg_logits, atol=1e-4)


def test_gradients_equal_those_of_the_plain_formulation(lite0):
    model = network(lite0)
    query, supports, masks = episode(2, 2)
    query_masks = (torch.rand(2, 65, 65) < 0.3).long()
    gradients = []
    for run in (model, partial(plain_forward, model)):
        model.zero_grad()
        loss = NTRELoss(bank=PrototypeBank(class_ids=range(1, 3), channels=8))
        loss(run(query, supports, masks), query_masks, masks, torch.tensor([1, 2]))["total"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, expected in gradients[1].items():
        assert (gradients[0][name] - expected).abs().max() < 1e-3 * expected.abs().max(), name


@torch.no_grad()
@pytest.mark.parametrize("row", NETWORKS)
def test_prediction_depends_on_what_the_support_masks_show(lite0, row):
    """Guards the invariances below: a network blind to its supports would pass them all."""
    model = network(lite0, row)
    query, supports, masks = episode()
    other = masks.roll(20, dims=-1)
    assert (model(query, supports, masks).logits - model(query, supports, other).logits).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("row", NETWORKS)
def test_copies_of_one_support_equal_that_support(lite0, row):
    copies = 3
    model = network(lite0, row)
    query, supports, masks = episode(2, 1)
    one = model(query, supports, masks)
    several = model(query, supports.repeat(1, copies, 1, 1, 1), masks.repeat(1, copies, 1, 1))
    assert_same(several, one)


@torch.no_grad()
@pytest.mark.parametrize("row", NETWORKS)
def test_order_of_the_supports_does_not_matter(lite0, row):
    model = network(lite0, row)
    query, supports, masks = episode(2, 4)
    order = [2, 0, 3, 1]
    expected, got = model(query, supports, masks), model(query, supports[:, order], masks[:, order])
    assert_same(got, expected)
    assert torch.allclose(got.support_features, expected.support_features[:, order], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("row", NETWORKS)
def test_a_batch_equals_its_episodes_one_by_one(lite0, row):
    model = network(lite0, row)
    query, supports, masks = episode(3, 2)
    batch = model(query, supports, masks)
    for b in range(3):
        alone = model(query[b : b + 1], supports[b : b + 1], masks[b : b + 1])
        for name, value in tensors(alone).items():
            assert torch.allclose(tensors(batch)[name][b : b + 1], value, atol=1e-4), name


@torch.no_grad()
@pytest.mark.parametrize("row", NETWORKS)
def test_255_in_a_support_mask_is_the_same_as_0(lite0, row):
    model = network(lite0, row)
    query, supports, masks = episode()
    ignored = masks.clone()
    ignored[(masks == 0) & (torch.rand(masks.shape) < 0.5)] = 255
    assert (ignored == 255).any()
    assert torch.equal(model(query, supports, ignored).logits, model(query, supports, masks).logits)


@torch.no_grad()
@pytest.mark.parametrize("row", NETWORKS)
@pytest.mark.parametrize("value", [0, 255])
def test_a_support_mask_without_target_gives_a_finite_output(lite0, row, value):
    model = network(lite0, row)
    query, supports, masks = episode(1, 2)
    masks[:, 0] = value
    one_empty = model(query, supports, masks)
    masks[:] = value
    all_empty = model(query, supports, masks)
    assert one_empty.logits.isfinite().all()
    assert all_empty.logits.isfinite().all()
    assert (all_empty.prior == 0).all()
    assert (all_empty.support_prototype == 0).all()


@pytest.mark.parametrize("row", ROWS)
def test_ablation_row_runs_with_none_where_a_part_is_off(lite0, row):
    bgem, doem, pcl = ROWS[row]
    model = network(lite0, row)
    bank = PrototypeBank(class_ids=range(1, 4), channels=8, capacity=10) if pcl else None
    query, supports, masks = episode(2, 3)
    out = model(query, supports, masks)
    sides = [9, 4, 2]
    eliminated = sides if row in ("per scale", "authors") else sides[: int(doem)]
    expected = {
        ".logits": (2, 1, 65, 65),
        ".fem.logits": (2, 1, 9, 9),
        **{f".fem.scale_logits.{i}": (2, 1, side, side) for i, side in enumerate(sides)},
        ".prior": (2, 1, 9, 9),
        ".query_feature": (2, 8, 9, 9),
        ".support_features": (2, 3, 8, 9, 9),
        ".support_prototype": (2, 8, 1, 1),
        **({".query_bg_logits": (2, 1, 9, 9), ".support_bg_logits": (2, 3, 1, 9, 9)} if bgem else {}),
        **{f".eliminated.{i}.activated": (2, 8, side, side) for i, side in enumerate(eliminated)},
        **{f".eliminated.{i}.initial_logits": (2, 1, side, side) for i, side in enumerate(eliminated)},
        **{f".eliminated.{i}.do_mask": (2, 1, side, side) for i, side in enumerate(eliminated)},
        **{f".eliminated.{i}.do_prototype": (2, 8, 1, 1) for i in range(len(eliminated))},
    }
    assert {name: tuple(value.shape) for name, value in tensors(out).items()} == expected
    terms = NTRELoss(bank=bank)(out, masks[:, 0], masks, torch.tensor([1, 3]))
    assert all(term.isfinite() for term in terms.values())
    assert [terms["bg"] != 0, terms["initial"] != 0, terms["pcl"] != 0] == [bgem, doem, pcl]
    assert terms["final"] > 0
    assert terms["fem_aux"] > 0


@pytest.mark.parametrize("row", ROWS)
def test_every_trainable_parameter_gets_a_gradient_and_the_backbone_none(lite0, row):
    model = network(lite0, row, as_built=True).train()
    bank = PrototypeBank(class_ids=range(1, 4), channels=8, capacity=10) if ROWS[row][2] else None
    query, supports, masks = episode(2, 2)
    loss = NTRELoss(bank=bank)(model(query, supports, masks), masks[:, 0].flip(-1), masks, torch.tensor([1, 2]))
    loss["total"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if not name.startswith("backbone.")}
    assert [n for n, g in gradients.items() if g is None or not g.isfinite().all() or not g.any()] == []
    assert [n for n, p in model.backbone.named_parameters() if p.requires_grad or p.grad is not None] == []


@pytest.mark.parametrize("kind", ["efficientnet_lite0", "resnet50", "vgg16_bn"])
def test_a_train_mode_forward_moves_nothing_in_the_backbone(lite0, kind):
    backbone = lite0[0] if kind == "efficientnet_lite0" else random_backbone(kind)[0]
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert any(name.endswith("running_var") for name in before)
    model = build_ntrenet(backbone, channels=4, prototype_channels=4, fem_scales=(1,)).train()
    model.backbone.train()
    out = model(*episode(2, 1, size=(33, 33)))
    out.logits.sum().backward()
    after = backbone.state_dict()
    assert [name for name, value in before.items() if not torch.equal(after[name], value)] == []


@pytest.mark.parametrize("row", ["pfenet", "bgem+doem+pcl", "authors"])
def test_mixed_precision_trains_and_stays_near_single_precision(lite0, row):
    model = network(lite0, row)
    query, supports, masks = episode(2, 2)
    bank = PrototypeBank(class_ids=range(1, 4), channels=8, capacity=10) if ROWS[row][2] else None
    expected = model(query, supports, masks).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(query, supports, masks)
        terms = NTRELoss(bank=bank)(out, masks[:, 0], masks, torch.tensor([1, 2]))
    terms["total"].backward()
    assert (out.logits - expected).abs().mean() < 0.1 * expected.std()
    assert {term.dtype for term in terms.values()} == {torch.float32}
    assert [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.isfinite().all()] == []


def test_train_leaves_the_backbone_in_eval_mode_and_reaches_the_rest(lite0):
    model = network(lite0).train()
    assert [name for name, m in model.backbone.named_modules() if m.training] == []
    assert all(m.training for m in (model, model.fem, model.bgmm, *model.eliminations.modules(), *model.reduce_query))
    assert not any(m.training for m in model.eval().modules())


def test_dropout_acts_in_train_mode_only(lite0):
    model, inputs = network(lite0), episode(1, 1)
    assert torch.equal(model(*inputs).logits, model(*inputs).logits)
    model.train()
    dropped = (model(*inputs).query_feature.flatten(2) == 0).all(2).float().mean()
    assert dropped > 0
    assert not torch.equal(model(*inputs).logits, model(*inputs).logits)


@pytest.mark.parametrize("row", NETWORKS)
def test_convolutions_before_a_relu_start_from_hes_initialisation_and_the_prior_weighs_as_much_as_a_feature(lite0, row):
    bgem, doem, _ = ROWS[row]
    sizes = {"channels": 64, "prototype_channels": 12, "fem_scales": (1, 0.5)}
    model = build_ntrenet(lite0[0], bgem=bgem, doem=doem, **KINDS.get(row, {}), **sizes)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not name.startswith("backbone.") and module.out_channels > 1:
            he = math.sqrt(2 / module.weight[0].numel())
            prior_channel = module.in_channels == 2 * 64 + 1
            features = module.weight[:, :-1] if prior_channel else module.weight
            assert features.std().item() == pytest.approx(he, rel=0.1), name
            if prior_channel:  # one input channel beside 64 of the feature
                assert module.weight[:, -1].std().item() == pytest.approx(he * math.sqrt(64), rel=0.35), name


def test_background_prototype_learns_from_each_of_its_three_uses(lite0):
    model = network(lite0)
    out = model(*episode(1, 1))
    # the final prediction knows P_BG through BGEM only: no gradient flows through the mask of eq. 7
    for prediction in (out.query_bg_logits, out.support_bg_logits, out.logits):
        (gradient,) = torch.autograd.grad(prediction.sum(), model.bgmm.prototype, retain_graph=True)
        assert (gradient != 0).all()


def test_both_reductions_learn_from_the_background(lite0):
    model = network(lite0)
    out = model(*episode(1, 2))
    for prediction, reduce in (
        (out.query_bg_logits, model.reduce_query),
        (out.support_bg_logits[:, 0], model.reduce_support),
        (out.support_bg_logits[:, 1], model.reduce_support),
    ):
        (gradient,) = torch.autograd.grad(prediction.sum(), reduce[0].weight, retain_graph=True)
        assert (gradient != 0).any()


def test_features_of_the_frozen_backbone_belong_to_no_graph(lite0):
    features = lite0[0](torch.randn(1, 3, 33, 33, requires_grad=True))
    assert not features.middle.requires_grad
    assert not lite0[0].high(features.stage3.clone().requires_grad_()).requires_grad


def test_dropout_rates_are_pfenets(lite0):
    rates = {name: m.p for name, m in network(lite0).named_modules() if isinstance(m, Dropout2d)}
    assert [rate for name, rate in rates.items() if name.startswith("reduce_")] == [0.5, 0.5]
    assert [rate for name, rate in rates.items() if name.startswith("fem.")] == [0.1] * 4


def test_dropout_zeroes_whole_channels_keeps_the_mean_and_rests_in_eval_mode():
    layer, x = Dropout2d(0.25), torch.ones(40, 50, 3, 2)
    dropped = layer(x).flatten(2)
    assert ((dropped == 0).all(2) | (dropped == 1 / 0.75).all(2)).all()
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert torch.equal(layer.eval()(x), x)


# ---------------------------------------------------------------------------------------------------------------------
# weights files and their errors
# ---------------------------------------------------------------------------------------------------------------------

REMEDY = re.compile(r"fetch|put (it|that file)|pip install|set model\.")


def load_error(path, name="efficientnet_lite0"):
    """The message with which a weights file is refused; it must name the file."""
    with pytest.raises(WeightsError) as caught:
        build_backbone(name, weights=str(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def lite0_state(lite0):
    return torch.load(lite0[1].source, weights_only=True)


def test_what_is_wrong_with_a_weights_file_is_said_with_the_remedy(tmp_path, lite0_state):
    """How files are damaged in other ways is in test_bad_input.py."""
    vgg, deeper = hollow_state(vgg_shapes()), hollow_state(resnet_shapes(deep=False, blocks=(3, 4, 23, 3)))
    partial = {name: v for name, v in lite0_state.items() if name != "_blocks.4._bn2.running_var"}
    for name, state, words in (
        ("resnet50", None, ["does not exist"]),
        ("resnet50", {}, ["missing"]),
        ("resnet50", vgg, ["another architecture", "conv1.weight", "features.0.weight"]),  # missing, and unknown
        ("resnet50", deeper, ["layer3.6.conv1.weight"]),
        ("efficientnet_lite0", partial, ["1 missing (_blocks.4._bn2.running_var)"]),
        ("efficientnet_lite0", lite0_state | {"_bn0.bias": torch.zeros(3)}, ["1 of another shape (_bn0.bias)"]),
    ):
        path = tmp_path / "weights.pth"
        if state is not None:
            torch.save(state, path)
        message = load_error(path, name).removeprefix(str(path))
        assert REMEDY.search(message) and all(word in message for word in words), message


def test_a_hash_in_the_name_is_checked(tmp_path, lite0, lite0_state):
    path = tmp_path / "efficientnet-lite0-0123abcd.pth"
    torch.save(lite0_state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    message = load_error(path)
    assert "0123abcd" in message
    assert digest[:8] in message
    assert REMEDY.search(message)
    right = path.rename(tmp_path / f"efficientnet-lite0-{digest[:8]}.pth")
    backbone, info = build_backbone("efficientnet_lite0", weights=str(right))
    assert info.sha256 == digest
    assert torch.equal(backbone.stem[0].weight, lite0[0].stem[0].weight)


def test_a_checkpoint_of_a_parallel_module_loads(tmp_path, lite0, lite0_state):
    path = tmp_path / "parallel.pth"
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in lite0_state.items()}}, path)
    backbone, _ = build_backbone("efficientnet_lite0", weights=str(path))
    expected = lite0[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("name", "file"),
    [("resnet101", "resnet101-63fe2227.pth"), ("vgg16_bn", "vgg16_bn-6c64b313.pth")],
)
def test_an_unreachable_network_says_which_file_to_put_where(tmp_path, monkeypatch, name, file):
    def unreachable(url, dst, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    folder = tmp_path / "not there yet"
    with pytest.raises(WeightsError) as caught:
        build_backbone(name, weights="imagenet", weights_dir=folder)
    message = str(caught.value)
    assert str(folder / file) in message
    assert f"https://download.pytorch.org/models/{file}" in message
    assert "no route to host" in message
    assert f"put it at {folder / file}" in message


def test_a_file_already_there_is_not_fetched_but_checked(tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("fetched")

    monkeypatch.setattr(torch.hub, "download_url_to_file", forbidden)
    (tmp_path / "resnet50-0676ba61.pth").write_bytes(b"half a download")
    with pytest.raises(WeightsError, match="damaged"):
        build_backbone("resnet50", weights="imagenet", weights_dir=tmp_path)


def test_a_fetched_file_is_checked_against_its_hash_and_then_loaded(tmp_path, monkeypatch):
    asked = {}

    def fetch(url, dst, hash_prefix=None, **kwargs):
        asked.update(url=url, hash_prefix=hash_prefix)
        torch.save({}, dst)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(WeightsError, match="damaged"):
        build_backbone("vgg16_bn", weights="imagenet", weights_dir=tmp_path)
    assert asked == {"url": "https://download.pytorch.org/models/vgg16_bn-6c64b313.pth", "hash_prefix": "6c64b313"}


# ---------------------------------------------------------------------------------------------------------------------
# batch norm folded into the convolutions
# ---------------------------------------------------------------------------------------------------------------------


def unfolded(backbone, images):
    """Middle features, stage 3 and stage 4 by the backbone's own modules, batch norm and all."""
    second = backbone.stage2(backbone.stage1(backbone.stem(images)))
    third = backbone.stage3(second)
    middle = torch.cat([third, bilinear(second, tuple(third.shape[-2:]))], 1) * backbone.middle_scale
    return middle, third, backbone.stage4(third)


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet50", "vgg16_bn", "efficientnet_lite0"])
def test_folding_batch_norm_changes_features_by_rounding_only(name):
    torch.manual_seed(0)
    backbone, _ = build_backbone(name, weights="random")
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                nn.init.normal_(tensor, std=0.2)
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 1.5)
    images = torch.randn(2, 3, 49, 65)
    middle, third, high = unfolded(backbone, images)
    backbone.fold_batch_norm()
    assert not [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    features = backbone(images)
    for got, expected in ((features.middle, middle), (features.stage3, third), (backbone.high(third), high)):
        assert expected.std() > 0
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_the_copy_of_a_lower_precision_follows_weights_that_are_loaded_or_folded(lite0):
    backbone, _ = build_backbone("efficientnet_lite0", weights="random")
    images = torch.randn(1, 3, 33, 33)
    outer = nn.Sequential(build_backbone("efficientnet_lite0", weights="random")[0])  # as a part of a model
    with torch.autocast("cpu", torch.bfloat16):
        expected = lite0[0](images).middle
        assert expected.dtype == torch.bfloat16
        assert not torch.equal(backbone(images).middle, expected)
        assert not torch.equal(outer[0](images).middle, expected)
        backbone.load_state_dict(lite0[0].state_dict())
        outer.load_state_dict({f"0.{name}": value for name, value in lite0[0].state_dict().items()})
        assert torch.equal(backbone(images).middle, expected)
        assert torch.equal(outer[0](images).middle, expected)
        backbone.fold_batch_norm()
        assert not torch.equal(backbone(images).middle, expected)  # rounded otherwise
    assert backbone(images).middle.dtype == torch.float32


def test_a_copy_made_in_an_evaluation_serves_training():
    backbone, _ = build_backbone("efficientnet_lite0", weights="random")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        backbone(torch.randn(1, 3, 33, 33))
    head = nn.Conv2d(backbone.middle_channels, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        head(backbone(torch.randn(1, 3, 33, 33)).middle).sum().backward()
    assert head.weight.grad.abs().sum() > 0
