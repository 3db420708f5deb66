"""The paper's losses: one pure function an equation, then :class:`NTRELoss` that puts them together.

Shapes: B batch, K shots, C channels, (H, W) mask side, (h, w) feature side. Masks are integer: 1 target,
0 other, 255 ignored. Predictions are logits, so every logarithm is taken in its stable form,
-log(sigmoid(x)) = softplus(-x) and -log(1 - sigmoid(x)) = softplus(x).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import IGNORE
from model.doem import distracting_object_mask
from model.ntrenet import NTRENetOutput
from model.ops import foreground, masked_average_pool, resize
from model.parallel import gathered, mean_over_batch, processes, rank
from model.prototype_bank import PrototypeBank

Negatives = Literal["do", "bg", "non_target"]
Regions = Literal["predicted", "ground_truth"]


def target_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Compute the binary cross-entropy of one prediction against its mask, a term of eq. 12.

        BCE(y, M), mean over all pixels of the batch that are not 255

    Args:
        logits: (B, 1, *, *), resized to the mask
        masks: (B, H, W)
    """
    logits = resize(logits.float(), (masks.shape[-2], masks.shape[-1])).squeeze(1)
    valid = masks != IGNORE
    loss = F.binary_cross_entropy_with_logits(logits, (masks == 1).float(), reduction="none")
    return mean_over_batch(loss.where(valid, 0).sum(), valid.sum())


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Compute the Dice loss of one prediction, which weighs every image alike, however small its target.

        1 - (2 sum y M + 1) / (sum y + sum M + 1), over the pixels of an image that are not 255; mean over the images

    Args:
        logits: (B, 1, *, *), resized to the mask
        masks: (B, H, W)
    """
    logits = resize(logits.float(), (masks.shape[-2], masks.shape[-1])).squeeze(1)
    y, target = logits.sigmoid() * (masks != IGNORE), (masks == 1).float()
    overlap, both = (y * target).sum((1, 2)), y.sum((1, 2)) + target.sum((1, 2))
    return mean_over_batch((1 - (2 * overlap + 1) / (both + 1)).sum(), len(masks))


def mean_target_loss(predictions: Sequence[Tensor], masks: Tensor) -> Tensor | None:
    """Average :func:`target_loss` over several predictions; None if there are none."""
    return torch.stack([target_loss(logits, masks) for logits in predictions]).mean() if predictions else None


def background_mining_loss(bg_logits: Tensor, masks: Tensor, alpha: float, *, ignored: bool = False) -> Tensor:
    """Compute L_BG, which asks for no background on the target, but some background in every image.

        L_BG = - 1/N sum_i log(1 - y_BG(i)) M(i)  -  alpha 1/Z sum_j log(y_BG(j))                       (eq. 3)

    N counts the target's pixels, Z all pixels, ignored ones (255) in neither, or with ``ignored`` in Z as in the
    authors' code; an image without target pixels has the second term only. The mean over the images is returned.

    Args:
        bg_logits: (N, 1, h, w), resized to the masks
        masks: (N, H, W), of queries and supports alike
    """
    logits = resize(bg_logits.float(), (masks.shape[-2], masks.shape[-1])).squeeze(1)
    target, valid = masks == 1, (masks != IGNORE) | ignored
    foreign = F.softplus(logits)  # -log(1 - y_BG); -log(y_BG) is softplus(-x) = softplus(x) - x
    on_target = foreign.where(target, 0).sum((1, 2)) / target.sum((1, 2)).clamp_min(1)
    everywhere = (foreign - logits).where(valid, 0).sum((1, 2)) / valid.sum((1, 2)).clamp_min(1)
    return mean_over_batch((on_target + alpha * everywhere).sum(), len(masks))


def prototypical_contrastive_loss(query: Tensor, support: Tensor, negatives: Tensor, stored: Tensor) -> Tensor:
    """Compute L_PCL, which asks for a target prototype like the support's and unlike those of distracting objects.

        L_PCL = -log( exp cos(P^q, P^s) / sum_B exp cos(P^q, P_DO) )                                    (eq. 10)

    As printed, cosine has no temperature, and the positive is not part of the denominator. Episodes with an empty bank
    contribute 0; the sum is still divided by B.

    Args:
        query, support: P^q and P^s, (B, C)
        negatives: prototypes of the bank for each episode's class, (B, N, C)
        stored: which of them are there, (B, N), boolean
    """
    positive = F.cosine_similarity(query, support, dim=1)
    similarity = torch.bmm(F.normalize(negatives, dim=2), F.normalize(query, dim=1).unsqueeze(2)).squeeze(2)
    denominator = similarity.masked_fill(~stored, -torch.inf).logsumexp(1)
    return mean_over_batch(torch.where(stored.any(1), denominator - positive, 0).sum(), len(query))


def base_loss(logits: Tensor, labels: Tensor, background: float = 0.3) -> Tensor:
    """Compute the base learner's cross-entropy, in which a position of background weighs ``background``, others 1.

    Args:
        logits: (B, n + 1, h, w)
        labels: (B, H, W), 0 background, 1 ... n base classes, 255 ignored; read at the nearest pixel
    """
    labels = F.interpolate(labels.unsqueeze(1).float(), size=logits.shape[-2:], mode="nearest").squeeze(1).long()
    weight = torch.where(labels == 0, background, 1.0).masked_fill(labels == IGNORE, 0)
    each = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
    return mean_over_batch((each * weight).sum(), weight.sum())


class Labels(NamedTuple):
    """Ground truth of a batch of episodes."""

    query_masks: Tensor
    """(B, H, W)"""
    support_masks: Tensor
    """(B, K, H, W)"""
    class_ids: Tensor
    """(B,), from 1"""
    query_classes: Tensor | None
    """(B, H, W), class ids of the query's pixels, which a base learner needs"""


class NTRELoss(nn.Module):
    """Computes the total training loss, with the prototype bank that eq. 10 needs.

        L_T = BCE(y_ini, M) + BCE(y, M)                                                                 (eq. 12)
        L   = beta L_T + lambda L_BG + gamma L_PCL  (+ mean over FEM's scales of BCE)                   (eq. 11)
              (+ cross-entropy of the base learner)

    It is the weighted sum of the terms in ``TERMS``. A term whose prediction the network does not make (the ablations)
    counts as 0.

    Args:
        weights: weight of each term, by its name in ``TERMS``.
        bank: None switches PCL off.
        alpha: weight inside eq. 3.
        bg_ignored: whether pixels of 255 count in the second term of eq. 3, as in the authors' code.
        pcl_negatives: prototypes that the bank stores (Table 4): of distracting objects, of the background, or
            of everything that is not the target.
        pcl_regions: where the query's target is when its negatives are pooled; P^q is pooled over y in both cases.
            "predicted", the paper: y_ini, and empty prototypes count nowhere. "ground_truth", the authors' code: the
            mask. Masks are then resized by nearest neighbour, 255 is not target, and empty prototypes count.
        pcl_drawn: how many prototypes of the bank, drawn at random, eq. 10 sums over; 0 for all.
        base_ids: class ids of the base learner's classes, in its order.
    """

    base_labels: Tensor
    """(256,) from a class id to the base learner's label: 0 for background and novel classes, 255 for 255"""

    def __init__(
        self,
        *,
        weights: Mapping[str, float],
        bank: PrototypeBank | None,
        alpha: float,
        bg_ignored: bool,
        pcl_negatives: Negatives,
        pcl_regions: Regions,
        pcl_drawn: int,
        base_ids: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if weights.keys() != self.TERMS.keys():
            raise ValueError(f"weights are of {', '.join(weights)}, but the loss terms are {', '.join(self.TERMS)}")
        self.weights = dict(weights)
        self.bank, self.alpha, self.bg_ignored = bank, alpha, bg_ignored
        self.pcl_negatives: Negatives = pcl_negatives
        self.pcl_regions: Regions = pcl_regions
        self.pcl_drawn = pcl_drawn
        labels = torch.zeros(256, dtype=torch.long)
        labels[IGNORE] = IGNORE
        labels[list(base_ids)] = torch.arange(1, len(base_ids) + 1)
        self.register_buffer("base_labels", labels, persistent=False)

    def forward(
        self,
        output: NTRENetOutput,
        query_masks: Tensor,
        support_masks: Tensor,
        class_ids: Tensor,
        query_classes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss of one batch; shapes as in :class:`Labels`.

        Returns:
            scalars: 'total', which is minimised, and every term of ``TERMS`` before its weight
        """
        labels = Labels(query_masks, support_masks, class_ids, query_classes)
        zero = output.logits.new_zeros((), dtype=torch.float32)
        terms = {
            name: zero if (loss := term(self, output, labels)) is None else loss for name, term in self.TERMS.items()
        }
        total = sum((self.weights[name] * loss for name, loss in terms.items()), zero)
        return {"total": total, **terms}

    def final(self, output: NTRENetOutput, labels: Labels) -> Tensor:
        """Compare y with the query's mask."""
        return target_loss(output.fem.logits, labels.query_masks)

    def dice(self, output: NTRENetOutput, labels: Labels) -> Tensor | None:
        """Compare y with the query's mask by their overlap; an option beyond the paper."""
        return dice_loss(output.fem.logits, labels.query_masks) if self.weights["dice"] else None

    def initial(self, output: NTRENetOutput, labels: Labels) -> Tensor | None:
        """Compare y_ini with the query's mask; the mean over the scales at which it is predicted."""
        return mean_target_loss([e.initial_logits for e in output.eliminated], labels.query_masks)

    def fem_aux(self, output: NTRENetOutput, labels: Labels) -> Tensor | None:
        """Compare FEM's predictions with the query's mask; the mean over its scales."""
        return mean_target_loss(output.fem.scale_logits, labels.query_masks)

    def background(self, output: NTRENetOutput, labels: Labels) -> Tensor | None:
        """Apply eq. 3 to the query and every support."""
        if output.query_bg_logits is None or output.support_bg_logits is None:
            return None
        logits = torch.cat([output.query_bg_logits.unsqueeze(1), output.support_bg_logits], 1).flatten(0, 1)
        masks = torch.cat([labels.query_masks.unsqueeze(1), labels.support_masks], 1).flatten(0, 1)
        return background_mining_loss(logits, masks, self.alpha, ignored=self.bg_ignored)

    def contrast(self, output: NTRENetOutput, labels: Labels) -> Tensor | None:
        """Store the batch's negative prototypes in the bank, then apply eq. 10."""
        bank, support_masks, class_ids = self.bank, labels.support_masks, labels.class_ids
        if bank is None:
            return None
        annotated = self.pcl_regions == "ground_truth"
        query_masks = labels.query_masks if annotated else None
        negatives = negative_prototypes(output, support_masks, self.pcl_negatives, query_masks=query_masks)
        bank.store(gathered(negatives).flatten(0, 1), gathered(class_ids).repeat_interleave(negatives.shape[1]))
        stored, counted = bank.of_classes(class_ids)
        query = masked_average_pool(output.query_feature, (output.fem.logits > 0).float())
        if annotated:
            x_s = output.support_features
            assert x_s is not None  # negative_prototypes has seen to that
            target = _nearest_target(support_masks.flatten(0, 1), x_s).float()
            support = masked_average_pool(x_s.flatten(0, 1), target).unflatten(0, support_masks.shape[:2]).mean(1)
        else:
            support = output.support_prototype.float()
            counted = counted & (query.detach().abs().amax((1, 2, 3)) > 0).unsqueeze(1)
        if 0 < self.pcl_drawn < bank.capacity:
            counted = drawn(counted, self.pcl_drawn)
        return prototypical_contrastive_loss(query.flatten(1), support.flatten(1), stored, counted)

    def base(self, output: NTRENetOutput, labels: Labels) -> Tensor | None:
        """Compare the base learner's prediction with the classes of the query's pixels."""
        if output.base_logits is None:
            return None
        if labels.query_classes is None:
            raise ValueError("a base learner needs the classes of the query's pixels")
        return base_loss(output.base_logits, self.base_labels[labels.query_classes.long()])

    TERMS: ClassVar[dict[str, Callable[..., Tensor | None]]] = {
        "final": final,
        "initial": initial,
        "fem_aux": fem_aux,
        "bg": background,
        "pcl": contrast,
        "base": base,
        "dice": dice,
    }
    """The terms of the total loss; a method returns None if the network makes no prediction for it. Weights are in
    util/config.py under the same names."""
    NAMES: ClassVar = ("total", *TERMS)


def drawn(stored: Tensor, count: int) -> Tensor:
    """Keep at most ``count`` true entries of each row of ``stored`` (B, N), chosen at random; the others become false.

    All processes draw for the whole batch, as :class:`model.parallel.Dropout2d` does, and take their own rows.
    """
    noise = torch.rand(processes() * len(stored), stored.shape[1], device=stored.device)
    noise = noise[rank() * len(stored) :][: len(stored)].masked_fill(~stored, -1)
    chosen = torch.zeros_like(stored).scatter(1, noise.topk(count, dim=1).indices, True)
    return chosen & stored


@torch.no_grad()
def negative_prototypes(
    output: NTRENetOutput, support_masks: Tensor, kind: Negatives, *, query_masks: Tensor | None = None
) -> Tensor:
    """Pool the negatives of eq. 10 in the query and in every support, (B, 1 + K, C); zero if the region is empty.

    The query's target is the prediction y_ini, a support's its mask; 255 in a support belongs to no region. Given
    the ``query_masks`` (B, H, W) it is the authors' form instead: the query's target is its mask as well, masks are
    resized by nearest neighbour, and 255 is not target.

        do: neither background nor target (eq. 7)    bg: background, not target    non_target: all but the target
    """
    bg_q, bg_s, x_q, x_s = (
        output.query_bg_logits,
        output.support_bg_logits,
        output.query_feature,
        output.support_features,
    )
    if bg_q is None or bg_s is None or x_s is None or not output.eliminated:
        raise ValueError("the contrastive loss needs the background and the initial prediction: bgem and doem")
    size, masks_s = (x_q.shape[-2], x_q.shape[-1]), support_masks.flatten(0, 1)
    if query_masks is None:
        target_q, target_s = resize(output.eliminated[0].initial_logits, size) > 0, foreground(masks_s, size) > 0
        ignored_s = resize((masks_s == IGNORE).float().unsqueeze(1), size) > 0
    else:
        target_q, target_s = _nearest_target(query_masks, x_q), _nearest_target(masks_s, x_q)
        ignored_s = torch.zeros_like(target_s)

    def region(background: Tensor, target: Tensor) -> Tensor:
        if kind == "do":
            return distracting_object_mask(background, target)
        return (background & ~target if kind == "bg" else ~target).float()

    query = masked_average_pool(x_q, region(bg_q > 0, target_q)).flatten(1)
    support = masked_average_pool(x_s.flatten(0, 1), region(bg_s.flatten(0, 1) > 0, target_s) * ~ignored_s).flatten(1)
    return torch.cat([query.unsqueeze(1), support.unflatten(0, support_masks.shape[:2])], 1)


def _nearest_target(masks: Tensor, like: Tensor) -> Tensor:
    """Masks (N, H, W) resized by nearest neighbour to the side of ``like``: where the target is, (N, 1, h, w)."""
    return F.interpolate(masks.unsqueeze(1).float(), size=like.shape[-2:], mode="nearest") == 1
