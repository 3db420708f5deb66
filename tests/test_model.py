"""The network against independent oracles: loops in float64, numbers worked out by hand, and the plain formulation.

Shapes: B batch, K shots, C channels, D prototype channels, (H, W) image, (h, w) features.
"""

import copy
import hashlib
import math
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.backbone import build_backbone, fuse_batch_norm
from model.doem import mine_distracting_objects
from model.fem import FEM
from model.ops import concat_conv, masked_average_pool
from model.parallel import Dropout2d
from model.prototype_bank import PrototypeBank
from model.weights import WeightsError
from tests.authors import authors_forward, authors_head
from tests.networks import loss, network, trained_without_dropout
from tests.pfenet import (
    NaiveResNet,
    NaiveVGG,
    batch_norm,
    bilinear,
    conv2d,
    difference,
    episode,
    expand_to,
    pfenet,
    pfenet_fem,
    pfenet_head,
    random_state,
    resnet_shapes,
    to_our_names,
    vgg_shapes,
)
from tests.plain import plain_forward

PASCAL_BINS, COCO_BINS = (60, 30, 15, 8), (1.0, 0.5, 0.25, 0.125)


def array(tensor):
    return tensor.detach().numpy().astype(np.float64)


# ---------------- ops


@pytest.mark.parametrize("size", [(5, 8), (2, 2)])
@pytest.mark.parametrize("maps", [0, 1, 2])
@pytest.mark.parametrize("prototypes", [1, 3])
@pytest.mark.parametrize("kernel", [1, 3])
def test_concat_conv_and_its_gradients_equal_convolving_the_concatenation(kernel, prototypes, maps, size):
    conv = nn.Conv2d(4 + 6 + maps, 5, kernel, padding=kernel // 2).double()
    feature, prototype = torch.randn(3, 4, *size).double(), torch.randn(prototypes, 6, 1, 1).double()
    extra = [torch.rand(3, maps, *size).double()] if maps else []
    inputs = [x.requires_grad_() for x in (feature, prototype, *extra, *conv.parameters())]
    expected = conv(torch.cat([feature, prototype.expand(3, 6, *size), *extra], 1))
    got = concat_conv(conv, feature, prototype, *extra)
    assert torch.allclose(got, expected, atol=1e-12)
    weights = torch.randn_like(expected)
    gradients = (torch.autograd.grad((out * weights).sum(), inputs) for out in (got, expected))
    for gradient, wanted in zip(*gradients, strict=True):
        assert torch.allclose(gradient, wanted, atol=1e-11)


def test_masked_average_pool_of_an_empty_mask_is_zero_with_finite_gradient():
    feature = torch.randn(2, 3, 4, 4, requires_grad=True)
    pooled = masked_average_pool(feature, torch.zeros(2, 1, 4, 4))
    pooled.sum().backward()
    assert pooled.shape == (2, 3, 1, 1) and not pooled.any() and not feature.grad.any()


def test_masked_average_pool_of_half_precision_sums_beyond_the_range_of_half_precision():
    feature = torch.full((1, 1, 300, 300), 3.0, dtype=torch.half)  # sums to 270,000; float16 ends at 65,504
    assert masked_average_pool(feature, torch.ones(1, 1, 300, 300, dtype=torch.half)).item() == 3.0


# ---------------- prior


# ---------------- DOEM; the equations of the full network test every box


@pytest.mark.parametrize("average", ["region", "image"])
def test_doem_without_distracting_objects_gives_a_zero_prototype_and_finite_gradients(average):
    feature = torch.randn(2, 3, 4, 4, requires_grad=True)
    background = torch.full((2, 1, 4, 4), -5.0)
    background[0] = 5.0  # the first episode is all background, the second has none
    mask, prototype = mine_distracting_objects(feature, background, torch.full((2, 1, 4, 4), -5.0), average)
    prototype.sum().backward()
    assert mask.flatten(1).sum(1).tolist() == [0, 16]
    assert not prototype[0].any() and feature.grad.isfinite().all()
    assert torch.allclose(prototype[1, :, 0, 0], feature[1].mean((1, 2)), atol=1e-6)


def test_a_relative_target_is_cut_at_a_share_of_the_largest_probability_of_its_own_image():
    initial = torch.tensor([[0.9, 0.3, 0.2], [0.2, 0.1, 0.05]]).logit()[:, None, None]  # cuts at 0.27 and 0.06
    feature, background = torch.randn(2, 3, 1, 3), torch.full((2, 1, 1, 3), -5.0)
    mask, _ = mine_distracting_objects(feature, background, initial, "image", relative=True)
    assert mask.flatten(1).tolist() == [[0, 0, 1], [0, 0, 1]]


# ---------------- FEM against tests/pfenet.py: PFENet's names, two classes and plain concatenation


@torch.no_grad()
@pytest.mark.parametrize("maps", [0, 1])
@pytest.mark.parametrize(
    ("size", "scales"),
    [((9, 9), PASCAL_BINS), ((9, 9), COCO_BINS), ((17, 9), COCO_BINS), ((16, 16), (20, 8, 3)), ((6, 7), (1.0,))],
)
def test_fem_equals_pfenets_feature_enrichment(size, scales, maps):
    head = pfenet_head(4, scales, with_prior=maps)
    fem = trained_without_dropout(FEM(channels=4, scales=scales, maps=maps))
    fem.load_state_dict(to_our_names(head))
    inputs = torch.randn(2, 4, *size), torch.randn(2, 4, 1, 1), torch.rand(2, 1, *size) if maps else None
    expected, inner = pfenet_fem(head, *inputs, scales)
    got = fem(*inputs)
    assert expected.std() > 0.1
    for logits, wanted in zip((got.logits, *got.scale_logits), (expected, *inner), strict=True):
        assert logits.shape == difference(wanted).shape
        assert torch.allclose(logits, difference(wanted), atol=1e-4)
    assert fem.eval()(*inputs).scale_logits == ()


# ---------------- backbones against tests/pfenet.py: functions of a weights file's state dict


NAIVE = {"resnet50": NaiveResNet, "vgg16_bn": NaiveVGG}  # test_convert_pfenet.py tests the deep stem


@pytest.fixture(scope="module")
def random_backbone(tmp_path_factory):
    """Builds each kind once: a backbone with its batch norms, loaded from a file, and the file's state dict."""

    @cache
    def build(kind):
        state = random_state(vgg_shapes() if kind == "vgg16_bn" else resnet_shapes(deep=False))
        counters = [n.replace("running_mean", "num_batches_tracked") for n in state if n.endswith("running_mean")]
        path = tmp_path_factory.mktemp("weights") / f"{kind}.pth"
        torch.save({**state, **dict.fromkeys(counters, torch.tensor(7))}, path)
        backbone, info = build_backbone(kind, weights=str(path), fuse=False)
        assert info == (str(path), "standard", hashlib.sha256(path.read_bytes()).hexdigest())
        path.unlink()
        return backbone, state

    return build


@torch.no_grad()
@pytest.mark.parametrize(("kind", "size"), [("resnet50", (33, 49)), ("vgg16_bn", (65, 49))])
@pytest.mark.parametrize("fused", [False, True])
def test_backbone_features_equal_a_second_forward_written_from_the_weights_file(random_backbone, kind, size, fused):
    backbone, state = random_backbone(kind)
    if fused:
        backbone = copy.deepcopy(backbone)
        fuse_batch_norm(backbone)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    naive, images, masks = NAIVE[kind](state), torch.randn(2, 3, *size), episode(2, 1, size)[2][:, 0]
    stage2, stage3 = naive.features(images)
    target = bilinear((masks == 1).float().unsqueeze(1), tuple(stage3.shape[-2:]))
    query, support = backbone.features(images), backbone.features(images, masks)
    for got, expected in (
        (query.middle, torch.cat([stage3, stage2], 1)),
        (query.high, naive.high(stage3)),
        (support.middle, query.middle),
        (support.high, naive.high(stage3 * target) * target),
    ):
        assert 0.1 < expected.std() < 20
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    assert query.middle.shape[1] == backbone.middle_channels and query.high.shape[1] == backbone.high_channels
    assert query.middle.shape[-2:] == tuple(backbone.map_side(side) for side in size)


@pytest.mark.parametrize(
    ("name", "side", "middle_channels"),
    [("resnet50", 60, 1536), ("vgg16_bn", 30, 768), ("efficientnet_lite0", 60, 120)],
)
def test_features_of_the_papers_473_pixels_have_the_papers_side(name, side, middle_channels):
    with torch.device("meta"):  # shapes only
        backbone = build_backbone(name, weights="random", fuse=False)[0]
    features = backbone.features(torch.empty(1, 3, 473, 473, device="meta"))
    assert features.middle.shape == (1, middle_channels, side, side)
    assert features.high.shape[-2:] == (side, side)
    backbone.check_image_size(473)
    with pytest.raises(ValueError, match="465 or 473"):
        backbone.check_image_size(472)


# (expansion, stride, blocks) of EfficientNet-Lite0's groups; the fourth has stride 1, not 2 as published
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


@torch.no_grad()
@pytest.mark.parametrize(("size", "fuse"), [((65, 65), True), ((97, 41), False)])
def test_efficientnet_features_equal_a_second_forward_written_from_the_weights_file(size, fuse):
    backbone, info = build_backbone("efficientnet_lite0", fuse=fuse)
    state, images = torch.load(info.source, weights_only=True), torch.randn(2, 3, *size)
    _, _, stage2, stage3, stage4 = naive_lite0(state, images)
    got = backbone.features(images)
    assert stage2.shape[-2:] == ((size[0] + 7) // 8, (size[1] + 7) // 8)
    assert torch.allclose(got.middle, torch.cat([stage3, stage2], 1), atol=1e-3)
    assert torch.allclose(got.high, stage4, atol=1e-3)


# ---------------- PFENet from the images on


@torch.no_grad()
@pytest.mark.parametrize(("kind", "shots", "scales"), [("resnet50", 5, PASCAL_BINS), ("vgg16_bn", 1, COCO_BINS)])
def test_all_parts_off_is_pfenet(random_backbone, kind, shots, scales):
    backbone, state = random_backbone(kind)
    head = pfenet_head(16, scales, True, backbone.middle_channels)
    model = trained_without_dropout(network(backbone, bgem=False, doem=False, channels=16, fem_scales=scales))
    ours = to_our_names(head, prefix="fem.")
    assert set(ours) == {name for name in model.state_dict() if not name.startswith(("backbone.", "middle_scale"))}
    model.load_state_dict(ours, strict=False)
    side = 121 if kind == "vgg16_bn" else 65  # 8 x 8 positions, between which VGG's masks lie, and 9 x 9 at stride 8
    query, supports, masks = episode(1, shots, size=(side, side))
    expected, prior, prototype, inner = pfenet(NAIVE[kind](state), head, query, supports, masks, scales)
    got = model(query, supports, masks)
    assert difference(expected).std() > 0.1 * difference(expected).abs().max()
    # PFENet's prototypes are smaller by 0.0005 / (area of the mask), and that is all
    for ours, theirs in (
        (got.prior, prior),
        (got.support_prototype, prototype),
        *zip(got.fem.scale_logits, map(difference, inner), strict=True),
        (got.logits, difference(expected)),
    ):  # relative: random weights give logits and prototypes of any size
        assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()


# ---------------- the whole model


EVIDENCE = {"fem_prior": True, "do_similarity": True, "detach_initial": True}
ROWS = {  # of Table 3, and the other networks
    "pfenet": {"bgem": False, "doem": False},
    "bgem": {"doem": False},
    "authors": {},
    "printed": {"elimination": "single", "do_average": "region"},
    "printed bgem": {"elimination": "single", "doem": False},
    "ours": {"elimination": "single", "relative_target": True, **EVIDENCE},
    "ours at each scale": EVIDENCE,
}
every_row = pytest.mark.parametrize("row", ROWS)


def has(row, part):
    return ROWS[row].get(part, True)


def ablation(backbone, row="ours", *, scales=(1, 0.5, 0.25)):
    """A row in training mode, whose outputs are complete, but without dropout.

    Its weights are drawn here, so that no test depends on the model's initialisation, and the bias of each prediction
    is set so that 40 % of all positions are positive and no region is empty.
    """
    torch.manual_seed(2)
    sizes = {"channels": 8, "prototype_channels": 12, "fem_scales": scales}
    model = trained_without_dropout(network(backbone, **ROWS[row], **sizes))
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone."):
            fan_in = parameter[0].numel() if parameter.dim() == 4 and parameter.shape[0] > 1 else 1
            nn.init.normal_(parameter, std=math.sqrt(2 / fan_in) if fan_in > 1 else 0.5)
    if model.bgmm is not None:
        last = [part for part in model.bgmm.classifier.modules() if isinstance(part, nn.Conv2d)][-1]
        balance(last.bias, model, lambda out: out.query_bg_logits)
    for elimination in model.eliminations:
        balance(elimination.matching.initial[-1].bias, model, lambda out: out.eliminated[0].initial_logits)
    balance(model.fem.classifier[-1].bias, model, lambda out: out.fem.logits)
    torch.manual_seed(3)
    return model


@torch.no_grad()
def balance(bias, model, prediction):
    torch.manual_seed(4)
    bias -= prediction(model(*episode(6, 1))).quantile(0.6)


def make_bank():
    return PrototypeBank(class_ids=range(1, 4), channels=8, capacity=10)


def assert_same(got, expected, atol=1e-4):
    """Two outputs agree in every field that does not depend on the number of shots."""
    shots = {"support_features": None, "support_bg_logits": None}
    mine, theirs = tensors(got._replace(**shots)), tensors(expected._replace(**shots))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert value.shape == theirs[name].shape and torch.allclose(value, theirs[name], atol=atol), name


def tensors(record, prefix=""):
    """Every tensor of an output by name, however deep."""
    if isinstance(record, torch.Tensor):
        return {prefix: record}
    fields = record._asdict() if hasattr(record, "_asdict") else dict(enumerate(record or ()))
    return {k: v for name, field in fields.items() for k, v in tensors(field, f"{prefix}.{name}").items()}


@torch.no_grad()
@pytest.mark.parametrize("row", ["ours", "printed"])
def test_the_full_network_is_the_papers_equations_in_the_plain_formulation(lite0, row):
    scales, printed = (1.0, 0.5, 0.25), row == "printed"
    model = ablation(lite0, row)
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
    x_bg = conv2d(w, "eliminations.0.bgem.conv", torch.cat([x_q, expand_to(p_bg, x_q)], 1)).relu()  # eq. 4
    x_act = conv2d(w, "eliminations.0.matching.conv", torch.cat([x_bg, expand_to(p_s, x_q), out.prior], 1)).relu()
    hidden = conv2d(w, "eliminations.0.matching.initial.0", x_act).relu()
    y_ini = conv2d(w, "eliminations.0.matching.initial.2", hidden)  # eq. 5-6
    cut = 0.5 if printed else 0.3 * y_ini.sigmoid().amax((2, 3), keepdim=True)
    y_do = 1 - ((y_bg.sigmoid() > 0.5) | (y_ini.sigmoid() > cut)).float()  # eq. 7
    area = y_do.sum((2, 3), keepdim=True) if printed else 81  # eq. 8, or a mean over the image
    p_do = (x_q * y_do).sum((2, 3), keepdim=True) / area
    cosine = (x_q * p_do).sum(1, keepdim=True) / (x_q.norm(dim=1, keepdim=True) * p_do.norm(dim=1, keepdim=True))
    evidence = None if printed else out.prior - torch.nan_to_num(cosine)
    y, inner = pfenet_fem(head, x_act, p_do, evidence, scales)  # eq. 9

    assert 0 < y_do[0].mean() < 1 and 0 < y_do[1].mean() < 1
    assert difference(y).std() > 0.1
    for got, expected in (
        (out.support_prototype, p_s),
        (out.query_bg_logits, y_bg),
        *((out.support_bg_logits[:, k], bgmm(x_s[:, k])) for k in range(3)),
        *zip(out.eliminated[0], (x_act, y_ini, y_do, p_do), strict=True),
        (out.fem.logits, difference(y)),
        (out.logits, bilinear(difference(y), (65, 65))),
        *zip(out.fem.scale_logits, map(difference, inner), strict=True),
    ):
        assert got.shape == expected.shape
        assert torch.allclose(got, expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("shots", "scales"), [(1, PASCAL_BINS), (5, COCO_BINS)])
def test_authors_elimination_is_the_authors_network(lite0, scales, shots):
    sizes = {"channels": 8, "prototype_channels": 8, "fem_scales": scales}
    model = trained_without_dropout(network(lite0, elimination="authors", **sizes))
    assert (model.bgmm.prototype == 0).all()
    head = authors_head(8, scales)
    named = {name: value for name, value in head.items() if name != "p_bg"}
    ours = {"bgmm.prototype": head["p_bg"]} | to_our_names(named, prefix="fem.")
    assert set(ours) == {n for n in model.state_dict() if not n.startswith(("backbone.", "reduce_", "middle_scale"))}
    model.load_state_dict(ours, strict=False)
    out = model(*episode(2, shots, size=(129, 129)))
    inputs = out.query_feature, out.support_features, out.support_prototype, out.prior
    y, bg_q, bg_s, initial, inner = authors_forward(head, *inputs, scales)
    assert difference(y).std() > 0.1
    assert 0 < out.eliminated[0].do_mask.mean() < 1
    assert torch.allclose(out.support_bg_logits, bg_s[:, :, 1:] - bg_s[:, :, :1], atol=1e-3)
    ini = (e.initial_logits for e in out.eliminated)
    for got, expected in zip(
        (out.fem.logits, out.query_bg_logits, *ini, *out.fem.scale_logits), (y, bg_q, *initial, *inner), strict=True
    ):
        assert torch.allclose(got, difference(expected), atol=1e-3)


@torch.no_grad()
@every_row
@pytest.mark.parametrize("shots", [1, 3])
def test_every_ablation_equals_its_plain_formulation(lite0, row, shots):
    model = ablation(lite0, row)
    query, supports, masks = episode(2, shots)
    masks[0, 0] = 1  # one support is filled by its target, the others are not
    got, expected = model(query, supports, masks), plain_forward(model, query, supports, masks)
    assert_same(got, expected)
    if got.support_bg_logits is not None:
        assert torch.allclose(got.support_bg_logits, expected.support_bg_logits, atol=1e-4)


@pytest.mark.parametrize("row", ["ours", "printed"])
def test_gradients_equal_those_of_the_plain_formulation(lite0, row):
    """The first prediction's loss does not shape X_act in the one, and does in the other."""
    model = ablation(lite0, row)
    query, supports, masks = episode(2, 2)
    query_masks = (torch.rand(2, 65, 65) < 0.3).long()
    gradients = []
    for run in (model, partial(plain_forward, model)):
        model.zero_grad()
        terms = loss(make_bank())(run(query, supports, masks), query_masks, masks, torch.tensor([1, 2]))
        terms["total"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, expected in gradients[1].items():
        assert (gradients[0][name] - expected).abs().max() < 1e-3 * expected.abs().max(), name


@torch.no_grad()
@every_row
def test_eval_mode_predicts_the_same_without_what_only_a_loss_reads(lite0, row):
    model, inputs = ablation(lite0, row), episode()
    complete, short = model(*inputs), model.eval()(*inputs)
    assert short.support_features is None and short.support_bg_logits is None and short.fem.scale_logits == ()
    assert_same(short, complete._replace(fem=complete.fem._replace(scale_logits=())))


@torch.no_grad()
@every_row
def test_predictions_depend_on_the_support_masks_but_on_nothing_in_them_besides_the_target(lite0, row):
    """The first guards the invariances below: a network blind to its supports would pass them all."""
    model = ablation(lite0, row)
    query, supports, masks = episode()
    expected = model(query, supports, masks).logits
    assert (model(query, supports, masks.roll(20, dims=-1)).logits - expected).abs().max() > 1e-2
    ignored = masks.masked_fill((masks == 0) & (torch.rand(masks.shape) < 0.5), 255)
    assert torch.equal(model(query, supports, ignored).logits, expected)


@torch.no_grad()
@every_row
def test_copies_of_one_support_equal_that_support(lite0, row):
    model = ablation(lite0, row)
    query, supports, masks = episode(2, 1)
    several = model(query, supports.repeat(1, 3, 1, 1, 1), masks.repeat(1, 3, 1, 1))
    assert_same(several, model(query, supports, masks))


@torch.no_grad()
@every_row
@pytest.mark.parametrize("value", [0, 255])
def test_a_support_mask_without_target_gives_a_finite_output(lite0, row, value):
    model = ablation(lite0, row)
    query, supports, masks = episode(1, 2)
    masks[:, 0] = value
    assert model(query, supports, masks).logits.isfinite().all()
    masks[:] = value
    all_empty = model(query, supports, masks)
    assert all_empty.logits.isfinite().all()
    assert not all_empty.prior.any() and not all_empty.support_prototype.any()


@every_row
def test_every_trainable_parameter_gets_a_gradient_and_the_backbone_none(lite0, row):
    sizes = {"channels": 8, "prototype_channels": 12, "fem_scales": (1, 0.5, 0.25)}
    model = network(lite0, **ROWS[row], **sizes).train()
    query, supports, masks = episode(2, 2)
    bank = make_bank() if has(row, "doem") else None
    terms = loss(bank)(model(query, supports, masks), masks[:, 0].flip(-1), masks, torch.tensor([1, 2]))
    terms["total"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if not name.startswith("backbone.")}
    assert [n for n, g in gradients.items() if g is None or not g.isfinite().all() or not g.any()] == []
    assert [n for n, p in model.backbone.named_parameters() if p.requires_grad or p.grad is not None] == []


@pytest.mark.parametrize("kind", ["resnet50", "vgg16_bn"])
def test_a_training_step_moves_nothing_in_the_backbone_which_stays_in_eval_mode(random_backbone, kind):
    backbone = random_backbone(kind)[0]
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert any(name.endswith("running_var") for name in before)
    model = network(backbone, channels=4, prototype_channels=4, fem_scales=(1,)).train()
    model.backbone.train()
    model(*episode(2, 1, size=(33, 33))).logits.sum().backward()
    assert [name for name, value in before.items() if not torch.equal(backbone.state_dict()[name], value)] == []
    assert not any(module.training for module in backbone.modules())
    assert all(m.training for m in (model, model.fem, model.bgmm, *model.eliminations.modules(), *model.reduce_query))


@pytest.mark.parametrize("row", ["pfenet", "ours", "authors"])
def test_mixed_precision_trains_and_stays_near_single_precision(lite0, row):
    model = ablation(lite0, row)
    query, supports, masks = episode(2, 2)
    expected = model(query, supports, masks).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(query, supports, masks)
        terms = loss(make_bank() if has(row, "doem") else None)(out, masks[:, 0], masks, torch.tensor([1, 2]))
    terms["total"].backward()
    assert (out.logits - expected).abs().mean() < 0.1 * expected.std()
    assert {term.dtype for term in terms.values()} == {torch.float32}
    assert [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.isfinite().all()] == []


def test_dropout_has_pfenets_rates_and_acts_in_training_only(lite0):
    model, inputs = network(lite0, channels=8, fem_scales=(1, 0.5, 0.25)).eval(), episode(1, 1)
    rates = {name: m.p for name, m in model.named_modules() if isinstance(m, Dropout2d)}
    assert [rate for name, rate in rates.items() if name.startswith("reduce_")] == [0.5, 0.5]
    assert [rate for name, rate in rates.items() if name.startswith("fem.")] == [0.1] * 4
    assert torch.equal(model(*inputs).logits, model(*inputs).logits)
    assert not torch.equal(model.train()(*inputs).logits, model(*inputs).logits)


def test_dropout_zeroes_whole_channels_and_keeps_the_mean():
    layer, x = Dropout2d(0.25), torch.ones(40, 50, 3, 2)
    dropped = layer(x.clone()).flatten(2)
    assert ((dropped == 0).all(2) | (dropped == 1 / 0.75).all(2)).all()
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert torch.equal(layer.eval()(x), x)


# ---------------- weights files; test_bad_input.py and test_refusals.py test their errors


def test_a_fetched_file_is_checked_and_one_already_there_is_not_fetched_again(tmp_path, monkeypatch):
    asked = []

    def fetch(url, dst, hash_prefix=None, **kwargs):
        asked.append((url, hash_prefix))
        torch.save({}, dst)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        with pytest.raises(WeightsError, match="damaged"):
            build_backbone("vgg16_bn", weights="imagenet", weights_dir=tmp_path)
    assert asked == [("https://download.pytorch.org/models/vgg16_bn-6c64b313.pth", "6c64b313")]
