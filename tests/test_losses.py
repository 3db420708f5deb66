"""The losses and the prototype bank against loops in float64, and numbers worked out by hand.

Shapes: B batch, K shots, C channels, (H, W) mask, (h, w) features.
"""

import math
from collections import deque

import numpy as np
import pytest
import torch

from model.elimination import Eliminated
from model.fem import FEMOutput
from model.losses import (
    background_mining_loss,
    dice_loss,
    drawn,
    negative_prototypes,
    prototypical_contrastive_loss,
    target_loss,
)
from model.ntrenet import NTRENetOutput
from model.prototype_bank import PrototypeBank
from tests import networks
from tests.authors import authors_contrast

PRINTED = {"bg_ignored": False, "pcl_regions": "predicted", "pcl_drawn": 0}
"""options of the loss as the paper has them"""


def array(tensor):
    return tensor.detach().numpy().astype(np.float64)


def random_masks(*shape):
    """Integer masks with about half target, a fifth ignored."""
    masks = torch.randint(0, 2, shape)
    masks[torch.rand(shape) < 0.2] = 255
    return masks


def probability(logit):
    return 1 / (1 + math.exp(-logit))


def naive_resize(plane, size):
    """Bilinear with aligned corners, (h, w) -> size, one pixel after the other."""
    out = np.zeros(size)
    for i, j in np.ndindex(*size):
        y = i * (plane.shape[0] - 1) / (size[0] - 1)
        x = j * (plane.shape[1] - 1) / (size[1] - 1)
        top, left = min(int(y), plane.shape[0] - 2), min(int(x), plane.shape[1] - 2)
        for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
            out[i, j] += plane[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return out


def naive_target_loss(logits, masks):
    """(B, 1, *, *), (B, H, W) -> mean over the batch's pixels that are not 255."""
    total, count = 0.0, 0
    for plane, mask in zip(array(logits)[:, 0], masks.numpy(), strict=True):
        resized = naive_resize(plane, mask.shape)
        for i, j in np.ndindex(*mask.shape):
            if mask[i, j] != 255:
                y = probability(resized[i, j])
                total -= math.log(y) if mask[i, j] == 1 else math.log(1 - y)
                count += 1
    return total / count


def naive_dice_loss(logits, masks):
    """(B, 1, *, *), (B, H, W) -> mean over the images of 1 - the overlap of pixels that are not 255."""
    total = 0.0
    for plane, mask in zip(array(logits)[:, 0], masks.numpy(), strict=True):
        resized = naive_resize(plane, mask.shape)
        pairs = [(probability(resized[i]), float(mask[i] == 1)) for i in np.ndindex(*mask.shape) if mask[i] != 255]
        total += 1 - (2 * sum(y * m for y, m in pairs) + 1) / (sum(y + m for y, m in pairs) + 1)
    return total / len(masks)


def naive_background_mining_loss(logits, masks, alpha):
    """Eq. 3, (N, 1, *, *), (N, H, W) -> mean over the images."""
    losses = []
    for plane, mask in zip(array(logits)[:, 0], masks.numpy(), strict=True):
        resized = naive_resize(plane, mask.shape)
        on_target, everywhere, targets, pixels = 0.0, 0.0, 0, 0
        for i, j in np.ndindex(*mask.shape):
            if mask[i, j] == 255:
                continue
            y = probability(resized[i, j])
            everywhere -= math.log(y)
            pixels += 1
            if mask[i, j] == 1:
                on_target -= math.log(1 - y)
                targets += 1
        losses.append(on_target / max(targets, 1) + alpha * everywhere / max(pixels, 1))
    return sum(losses) / len(losses)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def naive_contrastive_loss(query, support, negatives):
    """Eq. 10, (B, C), (B, C), a list of prototypes an episode -> mean over B."""
    total = 0.0
    for q, s, bank in zip(query, support, negatives, strict=True):
        if len(bank) and any(q):
            total -= math.log(math.exp(cosine(q, s)) / sum(math.exp(cosine(q, n)) for n in bank))
    return total / len(query)


# ---------------- losses over pixels: eq. 12 and eq. 3


@pytest.mark.parametrize("size", [(7, 6), (3, 4)])
def test_losses_over_pixels_equal_loops(size):
    logits, masks = 2 * torch.randn(3, 1, 3, 4), random_masks(3, *size)
    masks[1][masks[1] == 1] = 0  # an image without target
    masks[2, 1:] = 255  # target_loss is a mean over all pixels, not over images: let their numbers differ
    assert target_loss(logits, masks).item() == pytest.approx(naive_target_loss(logits, masks), rel=1e-5)
    assert dice_loss(logits, masks).item() == pytest.approx(naive_dice_loss(logits, masks), rel=1e-5)
    for alpha in (0.0, 0.5):
        expected = naive_background_mining_loss(logits, masks, alpha)
        assert background_mining_loss(logits, masks, alpha).item() == pytest.approx(expected, rel=1e-5)


PIXEL_LOSSES = {
    "target": target_loss,
    "dice": dice_loss,
    "background": lambda logits, masks: background_mining_loss(logits, masks, 0.5),
}


@pytest.mark.parametrize("loss", PIXEL_LOSSES.values(), ids=PIXEL_LOSSES)
@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_ignored_pixels_change_neither_loss_nor_gradient(loss, extreme):
    masks, calm = random_masks(2, 5, 5), torch.randn(2, 1, 5, 5)
    wild = calm.clone()
    wild[(masks == 255).unsqueeze(1)] = extreme
    wild.requires_grad_()
    value = loss(wild, masks)
    value.backward()
    assert (masks == 255).any()
    assert value.item() == loss(calm, masks).item()
    assert (wild.grad[(masks == 255).unsqueeze(1)] == 0).all()
    assert (wild.grad[(masks != 255).unsqueeze(1)] != 0).all()


# ---------------- prototypical_contrastive_loss, eq. 10


def contrastive_batch():
    """Four episodes: a full bank, a part of one, no bank, and a full one again."""
    query, support, negatives = torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 6, 5)
    stored = torch.ones(4, 6, dtype=torch.bool)
    stored[1, 2:], stored[2] = False, False
    return query, support, negatives, stored


def test_contrastive_loss_equals_a_loop_over_episodes_and_the_bank():
    query, support, negatives, stored = contrastive_batch()
    banks = [array(n[s]) for n, s in zip(negatives, stored, strict=True)]
    expected = naive_contrastive_loss(array(query), array(support), banks)
    loss = prototypical_contrastive_loss(query, support, negatives, stored)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_an_episode_with_an_empty_bank_adds_nothing_and_no_gradient():
    query, support, negatives, stored = contrastive_batch()
    stored[3] = False
    query.requires_grad_(), support.requires_grad_()
    loss = prototypical_contrastive_loss(query, support, negatives, stored)
    loss.backward()
    for gradient in (query.grad, support.grad):
        assert (gradient[2:] == 0).all()
        assert (gradient[:2] != 0).all()
    nothing = prototypical_contrastive_loss(query[2:], support[2:], negatives[2:], stored[2:])
    nothing.backward()
    assert nothing.item() == 0


# ---------------- negative_prototypes and NTRELoss, on an output made by hand


def random_output(batch=3, shots=2, channels=4, side=3, image=6):
    """An output of the model and its masks; leaves of the graph, so that gradients can be read from it."""

    def leaf(*shape):
        return torch.randn(*shape).requires_grad_()

    # few target and ignored pixels, so that on the feature's grid every region keeps some positions
    support_masks = torch.zeros(batch, shots, image, image, dtype=torch.long)
    support_masks[torch.rand(support_masks.shape) < 0.1] = 1
    support_masks[torch.rand(support_masks.shape) < 0.04] = 255
    output = NTRENetOutput(
        logits=leaf(batch, 1, image, image),
        fem=FEMOutput(leaf(batch, 1, side, side), (leaf(batch, 1, side, side), leaf(batch, 1, 2, 2))),
        prior=torch.rand(batch, 1, side, side),
        query_feature=leaf(batch, channels, side, side),
        support_features=leaf(batch, shots, channels, side, side),
        support_prototype=leaf(batch, channels, 1, 1),
        query_bg_logits=leaf(batch, 1, side, side),
        support_bg_logits=leaf(batch, shots, 1, side, side),
        eliminated=(eliminated(leaf(batch, 1, side, side)),),
    )
    return output, random_masks(batch, image, image), support_masks


def eliminated(initial_logits):
    """An elimination's output; the losses read y_ini alone."""
    return Eliminated(*[torch.zeros(())] * 4)._replace(initial_logits=initial_logits)


def naive_pool(feature, region):
    """(C, h, w) and a boolean (h, w) -> mean over the region, (C,); zeros if it is empty."""
    positions = [feature[:, i, j] for i, j in np.ndindex(*region.shape) if region[i, j]]
    return sum(positions) / len(positions) if positions else np.zeros(len(feature))


def naive_negatives(output, support_masks, kind):
    """(B, 1 + K, C): the query's first."""

    def region(background, target):
        return {"do": ~(background | target), "bg": background & ~target, "non_target": ~target}[kind]

    rows = []
    for b in range(len(output.query_feature)):
        query_region = region(
            array(output.query_bg_logits[b, 0]) > 0, array(output.eliminated[0].initial_logits[b, 0]) > 0
        )
        row = [naive_pool(array(output.query_feature[b]), query_region)]
        for k, mask in enumerate(support_masks[b].numpy()):
            size = output.support_features.shape[-2:]
            target = naive_resize((mask == 1).astype(float), size) > 1e-9
            ignored = naive_resize((mask == 255).astype(float), size) > 1e-9
            support_region = region(array(output.support_bg_logits[b, k, 0]) > 0, target) & ~ignored
            row.append(naive_pool(array(output.support_features[b, k]), support_region))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("image", [5, 6])  # 5: every second pixel is a position; 6: positions lie between pixels
@pytest.mark.parametrize("kind", ["do", "bg", "non_target"])
def test_negative_prototypes_equal_a_loop_over_positions(kind, image):
    output, _, support_masks = random_output(image=image)
    support_masks[0, 1] = 255  # no region is left
    expected = naive_negatives(output, support_masks, kind)
    got = negative_prototypes(output, support_masks, kind)
    assert np.abs(array(got) - expected).max() < 1e-5
    assert not expected[0, 2].any() and expected.any(2).mean() > 0.7  # most regions are not empty
    assert not got.requires_grad


def make_bank(capacity=20):
    return PrototypeBank(class_ids=range(1, 5), channels=4, capacity=capacity)


@pytest.mark.parametrize("kind", ["do", "bg", "non_target"])
def test_loss_terms_and_their_weighted_sum_equal_the_loops(kind):
    output, query_masks, support_masks = random_output()
    class_ids, bank = torch.tensor([2, 4, 2]), make_bank()
    old = torch.randn(3, 4)
    bank.store(old, torch.tensor([2, 3, 4]))
    weights = {"final": 2.0, "initial": 2.0, "fem_aux": 1.2, "bg": 3.0, "pcl": 0.7, "dice": 0.5}
    loss = networks.loss(bank, weights=weights, alpha=0.3, pcl_negatives=kind, **PRINTED)
    terms = loss(output, query_masks, support_masks, class_ids)

    final = naive_target_loss(output.fem.logits, query_masks)
    initial = naive_target_loss(output.eliminated[0].initial_logits, query_masks)
    scales = [naive_target_loss(logits, query_masks) for logits in output.fem.scale_logits]
    bg_logits = torch.cat([output.query_bg_logits, output.support_bg_logits.flatten(0, 1)])
    bg_masks = torch.cat([query_masks, support_masks.flatten(0, 1)])
    bg = naive_background_mining_loss(bg_logits, bg_masks, 0.3)

    predicted = array(output.fem.logits)[:, 0] > 0
    p_q = [naive_pool(x, region) for x, region in zip(array(output.query_feature), predicted, strict=True)]
    p_s = array(output.support_prototype)[:, :, 0, 0]
    banks = {2: [array(old[0])], 3: [array(old[1])], 4: [array(old[2])]}
    for row, class_id in zip(naive_negatives(output, support_masks, kind), class_ids.tolist(), strict=True):
        banks[class_id].extend(prototype for prototype in row if prototype.any())
    pcl = naive_contrastive_loss(p_q, p_s, [banks[c] for c in class_ids.tolist()])

    assert terms["final"].item() == pytest.approx(final, rel=1e-5)
    assert terms["initial"].item() == pytest.approx(initial, rel=1e-5)
    assert terms["fem_aux"].item() == pytest.approx(sum(scales) / 2, rel=1e-5)
    assert terms["bg"].item() == pytest.approx(bg, rel=1e-5)
    assert terms["pcl"].item() == pytest.approx(pcl, rel=1e-5)
    assert terms["dice"].item() == pytest.approx(naive_dice_loss(output.fem.logits, query_masks), rel=1e-5)
    total = 2.0 * (initial + final + 0.6 * sum(scales) / 2) + 3.0 * bg + 0.7 * pcl + 0.5 * terms["dice"].item()
    assert terms["total"].item() == pytest.approx(total, rel=1e-5)
    for class_id, prototypes in banks.items():  # also the query's and the supports' prototypes
        assert np.allclose(bank_content(bank, class_id), sorted(map(tuple, prototypes)), atol=1e-5)


def test_the_authors_losses_equal_their_description():
    """Three steps of one shot: y_ini at two scales, 255 in L_BG's second term, PCL with annotated regions."""
    loss = networks.loss(PrototypeBank(class_ids=range(1, 5), channels=4, capacity=200, keep_empty=True))
    bank: dict[int, list] = {}
    for _ in range(3):
        output, query_masks, support_masks = random_output(shots=1)
        coarser = torch.randn(3, 1, 2, 2, requires_grad=True)
        output = output._replace(eliminated=(*output.eliminated, eliminated(coarser)))
        support_masks[1] = 1  # no distracting object: an empty prototype, which is stored
        class_ids = torch.tensor([2, 4, 2])
        x_q, x_s = output.query_feature, output.support_features[:, 0]
        bg_s, masks_s = output.support_bg_logits[:, 0], support_masks[:, 0]
        logits = output.fem.logits, output.query_bg_logits, bg_s
        pcl = authors_contrast(x_q, x_s, *logits, query_masks, masks_s, class_ids, bank)
        expected = torch.autograd.grad(pcl, (x_q, x_s))
        terms = loss(output, query_masks, support_masks, class_ids)
        got = torch.autograd.grad(terms["pcl"], (x_q, output.support_features), retain_graph=True)
        assert terms["pcl"].item() == pytest.approx(pcl.item(), abs=1e-5)
        assert torch.allclose(got[0], expected[0], atol=1e-4)
        assert torch.allclose(got[1][:, 0], expected[1], atol=1e-4)

    on_target = naive_background_mining_loss(
        torch.cat([output.query_bg_logits, bg_s]), torch.cat([query_masks, masks_s]), 0.0
    )
    everywhere = naive_background_mining_loss(  # the second term of a mask without ignored pixels and target
        torch.cat([output.query_bg_logits, bg_s]), torch.zeros_like(torch.cat([query_masks, masks_s])), 0.5
    )
    assert terms["bg"].item() == pytest.approx(on_target + everywhere, rel=1e-5)
    initial = [naive_target_loss(logits, query_masks) for logits in (output.eliminated[0].initial_logits, coarser)]
    assert terms["initial"].item() == pytest.approx(sum(initial) / 2, rel=1e-5)
    total = 0.6 * terms["initial"] + terms["final"] + 0.4 * terms["fem_aux"] + terms["bg"] + 0.01 * terms["pcl"]
    assert terms["total"].item() == pytest.approx(total.item(), rel=1e-6)


def test_drawing_keeps_a_random_part_of_what_is_stored():
    stored = torch.rand(200, 10) < 0.6
    chosen = drawn(stored, 4)
    assert not (chosen & ~stored).any()
    assert (chosen.sum(1) == stored.sum(1).clamp_max(4)).all()
    share = chosen.sum(0) / stored.sum(0)
    assert (share - share.mean()).abs().max() < 0.15  # no slot is preferred


def test_terms_of_what_is_switched_off_are_zero():
    output, query_masks, support_masks = random_output()
    class_ids = torch.tensor([1, 2, 3])
    bgem_only = output._replace(eliminated=())
    bare = bgem_only._replace(query_bg_logits=None, support_bg_logits=None)
    for given, present in ((bgem_only, {"final", "fem_aux", "bg"}), (bare, {"final", "fem_aux"})):
        pfenet = networks.loss()(given, query_masks, support_masks, class_ids)
        assert {name for name, value in pfenet.items() if value != 0} == present | {"total"}
    assert pfenet["total"].item() == pytest.approx((pfenet["final"] + 0.4 * pfenet["fem_aux"]).item(), rel=1e-6)


def test_contrast_sends_gradient_to_the_query_and_support_prototypes_only():
    output, query_masks, support_masks = random_output()
    bank = make_bank()
    loss = networks.loss(bank, **PRINTED)
    loss(output, query_masks, support_masks, torch.tensor([1, 2, 2]))["pcl"].backward()
    predicted = (output.fem.logits > 0).expand_as(output.query_feature)
    assert (output.query_feature.grad[predicted] != 0).all()
    assert (output.query_feature.grad[~predicted] == 0).all()
    assert (output.support_prototype.grad != 0).all()
    others = output.fem.logits, output.query_bg_logits, output.support_bg_logits, output.support_features
    assert all(x.grad is None for x in (*others, output.eliminated[0].initial_logits))
    assert not bank.prototypes.requires_grad


@pytest.mark.parametrize("value", [1e4, -1e4])
@pytest.mark.parametrize("fill", [0, 255])
def test_extreme_predictions_and_empty_masks_give_a_finite_total(value, fill):
    output, query_masks, support_masks = random_output()
    leaves = [torch.full(shape, value, requires_grad=True) for shape in [(3, 1, 3, 3)] * 3 + [(3, 2, 1, 3, 3)]]
    wild = output._replace(
        fem=output.fem._replace(logits=leaves[0]),
        eliminated=(eliminated(leaves[1]),),
        query_bg_logits=leaves[2],
        support_bg_logits=leaves[3],
    )
    masks = torch.full_like(query_masks, fill), torch.full_like(support_masks, fill)
    terms = networks.loss(make_bank(), **PRINTED)(wild, *masks, torch.tensor([1, 2, 3]))
    terms["total"].backward()
    assert all(term.isfinite() for term in terms.values())
    assert all(x.grad.isfinite().all() for x in (*leaves, wild.query_feature) if x.grad is not None)
    assert value > 0 or terms["pcl"] == 0  # nothing is predicted, so there is no P^q to contrast


# ---------------- PrototypeBank


def bank_content(bank, class_id):
    """Sorted prototypes of a class."""
    prototypes, filled = bank.of_classes(torch.tensor([class_id], device=bank.stored.device))
    return sorted(map(tuple, prototypes[0][filled[0]].tolist()))


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
@pytest.mark.parametrize("capacity", [1, 3, 7])
@pytest.mark.parametrize("trial", range(4))
def test_bank_keeps_what_a_deque_of_each_class_keeps(trial, capacity, device):
    """On a GPU too, which writes in no fixed order."""
    rng = np.random.default_rng([capacity, trial])
    bank = PrototypeBank(class_ids=(1, 4, 6), channels=2, capacity=capacity).to(device)
    deques = {c: deque(maxlen=capacity) for c in (1, 4, 6)}
    number = 1
    for _ in range(12):
        count = int(rng.integers(1, 20))  # often more of a class than it can keep
        prototypes = torch.arange(number, number + count)[:, None] * torch.tensor([1.0, -0.5])  # all different
        classes = rng.choice([1, 4, 6], count)
        number += count
        prototypes[rng.random(count) < 0.25] = 0  # empty ones are skipped
        bank.store(prototypes.to(device), torch.from_numpy(classes).to(device))
        for prototype, class_id in zip(prototypes.tolist(), classes.tolist(), strict=True):
            if any(prototype):
                deques[class_id].append(tuple(prototype))
        for class_id, expected in deques.items():
            assert bank_content(bank, class_id) == sorted(expected)
