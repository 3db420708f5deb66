"""The paper's losses: one pure function an equation, then :class:`NTRELoss` that puts them together.

Shapes: B batch, K shots, C channels, (H, W) mask side, (h, w) feature side. Masks are integer: 1 target,
0 other, 255 ignored. Predictions are logits, so every logarithm is taken in its stable form,
-log(sigmoid(x)) = softplus(-x) and -log(1 - sigmoid(x)) = softplus(x).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

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
    """Binary cross-entropy of one prediction against its mask, a term of eq. 12.

        BCE(y, M), mean over all pixels of the batch that are not 255

    Args:
        logits: (B, 1, *, *), resized to the mask
        masks: (B, H, W)
    """
    logits = resize(logits.float(), (masks.shape[-2], masks.shape[-1])).squeeze(1)
    valid = masks != IGNORE
    loss = F.binary_cross_entropy_with_logits(logits, (masks == 1).float(), reduction="none")
    return mean_over_batch(loss.where(valid, 0).sum(), valid.sum())


def background_mining_loss(bg_logits: Tensor, masks: Tensor, alpha: float, *, ignored: bool = False) -> Tensor:
    """L_BG: no background on the target, but some background in every image.

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


def prototypical_contrastive_loss(
    query: Tensor, support: Tensor, negatives: Tensor, stored: Tensor, temperature: float = 1.0
) -> Tensor:
    """L_PCL: the query's target prototype is like the support's and unlike those of distracting objects.

        L_PCL = -log( exp cos(P^q, P^s) / sum_B exp cos(P^q, P_DO) )                                    (eq. 10)

    As printed, cosine has no temperature (it is 1), and the positive is not part of the denominator. An episode of
    whose negatives none is stored adds nothing; the sum is divided by B.

    Args:
        query, support: P^q and P^s, (B, C)
        negatives: prototypes of the bank for each episode's class, (B, N, C)
        stored: which of them are there, (B, N), boolean
        temperature: what cosines are divided by
    """
    positive = F.cosine_similarity(query, support, dim=1) / temperature
    similarity = torch.bmm(F.normalize(negatives, dim=2), F.normalize(query, dim=1).unsqueeze(2)).squeeze(2)
    denominator = (similarity / temperature).masked_fill(~stored, -torch.inf).logsumexp(1)
    return mean_over_batch(torch.where(stored.any(1), denominator - positive, 0).sum(), len(query))


def base_loss(logits: Tensor, labels: Tensor, background: float = 0.3) -> Tensor:
    """Cross-entropy of the base learner, in which a position of background weighs ``background``, others 1.

    Args:
        logits: (B, n + 1, h, w)
        labels: (B, H, W), 0 background, 1 ... n base classes, 255 ignored; read at the nearest pixel
    """
    labels = F.interpolate(labels.unsqueeze(1).float(), size=logits.shape[-2:], mode="nearest").squeeze(1).long()
    weight = torch.where(labels == 0, background, 1.0).masked_fill(labels == IGNORE, 0)
    each = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
    return mean_over_batch((each * weight).sum(), weight.sum())


class LossTerms(NamedTuple):
    """Scalars. ``total`` is what is minimised; the others are its terms before their weights, 0 where switched off."""

    total: Tensor
    final: Tensor
    initial: Tensor
    fem_aux: Tensor
    bg: Tensor
    pcl: Tensor
    base: Tensor


class NTRELoss(nn.Module):
    """Total training loss, with the prototype bank that eq. 10 needs.

        L_T = initial BCE(y_ini, M) + BCE(y, M)                                                         (eq. 12)
        L   = beta L_T + lambda L_BG + gamma L_PCL  (+ beta fem_aux mean over FEM's scales of BCE)      (eq. 11)
              (+ base cross-entropy of the base learner)

    The terms follow the output: without y_BG or y_ini (the ablations) theirs are 0; where y_ini is predicted at
    several scales, its term is their mean.

    Args:
        bank: None switches PCL off.
        beta, lambda_bg, gamma: weights of eq. 11 (the paper leaves them open; gamma = 0.01 is the authors' code).
        alpha: weight inside eq. 3.
        initial: weight of y_ini's term (1 as printed, 0.6 in the authors' code).
        fem_aux: weight of FEM's per-scale predictions (0.4 in the authors' code; the paper is silent).
        bg_ignored: whether pixels of 255 count in the second term of eq. 3, as in the authors' code.
        pcl_negatives: what the bank stores (Table 4): prototypes of distracting objects, of the background, or
            of everything that is not the target.
        pcl_regions: where the target is for eq. 10. "predicted", the paper: P^q is pooled over y, the query's
            negatives lie outside y_ini, and empty prototypes count nowhere. "ground_truth", the authors' code: masks
            are resized by nearest neighbour for query and support, 255 is not target, and empty prototypes count.
        pcl_drawn: how many prototypes of the bank, drawn at random, eq. 10 sums over; 0 for all.
        pcl_temperature: what the cosines of eq. 10 are divided by.
        base: weight of the base learner's cross-entropy.
        base_ids: class ids of the base learner's classes, in its order.
    """

    base_labels: Tensor
    """(256,) from a class id to the base learner's label: 0 for background and novel classes, 255 for 255"""

    def __init__(
        self,
        *,
        bank: PrototypeBank | None,
        alpha: float = 0.5,
        beta: float = 1.0,
        lambda_bg: float = 1.0,
        gamma: float = 0.01,
        initial: float = 1.0,
        fem_aux: float = 0.4,
        bg_ignored: bool = False,
        pcl_negatives: Negatives = "do",
        pcl_regions: Regions = "predicted",
        pcl_drawn: int = 0,
        pcl_temperature: float = 1.0,
        base: float = 3.0,
        base_ids: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.bank = bank
        self.alpha, self.beta, self.lambda_bg, self.gamma = alpha, beta, lambda_bg, gamma
        self.initial, self.fem_aux, self.bg_ignored = initial, fem_aux, bg_ignored
        self.pcl_negatives: Negatives = pcl_negatives
        self.pcl_regions: Regions = pcl_regions
        self.pcl_drawn, self.pcl_temperature, self.base = pcl_drawn, pcl_temperature, base
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
    ) -> LossTerms:
        """Loss of one batch; stores its negative prototypes in the bank first, then takes eq. 10.

        Args:
            output: of the model
            query_masks: (B, H, W)
            support_masks: (B, K, H, W)
            class_ids: (B,), from 1
            query_classes: (B, H, W), class ids of the query's pixels; a base learner needs them
        """
        final = target_loss(output.feature_logits, query_masks)
        fem_aux = torch.stack([target_loss(logits, query_masks) for logits in output.scale_logits]).mean()
        zero = torch.zeros_like(final)
        initial = zero
        if output.initial_logits is not None:
            scales = (output.initial_logits, *output.coarser_initial_logits)
            initial = torch.stack([target_loss(logits, query_masks) for logits in scales]).mean()
        bg = zero
        if output.query_bg_logits is not None and output.support_bg_logits is not None:
            logits = torch.cat([output.query_bg_logits.unsqueeze(1), output.support_bg_logits], 1)
            masks = torch.cat([query_masks.unsqueeze(1), support_masks], 1)
            bg = background_mining_loss(logits.flatten(0, 1), masks.flatten(0, 1), self.alpha, ignored=self.bg_ignored)
        pcl = zero if self.bank is None else self._contrast(self.bank, output, query_masks, support_masks, class_ids)
        target = self.initial * initial + final + self.fem_aux * fem_aux
        base = zero
        if output.base_logits is not None:
            if query_classes is None:
                raise ValueError("a base learner needs the classes of the query's pixels")
            base = base_loss(output.base_logits, self.base_labels[query_classes.long()])
        total = self.beta * target + self.lambda_bg * bg + self.gamma * pcl + self.base * base
        return LossTerms(total, final, initial, fem_aux, bg, pcl, base)

    def _contrast(
        self, bank: PrototypeBank, output: NTRENetOutput, query_masks: Tensor, support_masks: Tensor, class_ids: Tensor
    ) -> Tensor:
        shots, annotated = support_masks.shape[1], self.pcl_regions == "ground_truth"
        negatives = negative_prototypes(
            output, support_masks, self.pcl_negatives, query_masks=query_masks if annotated else None
        )
        bank.store(gathered(negatives).flatten(0, 1), gathered(class_ids).repeat_interleave(1 + shots))
        stored, counted = bank.of_classes(class_ids)
        if annotated:
            x_q, x_s = output.query_feature, output.support_features
            assert x_s is not None  # negative_prototypes has seen to that
            query = masked_average_pool(x_q, _nearest_target(query_masks, x_q).float())
            of_each = masked_average_pool(x_s.flatten(0, 1), _nearest_target(support_masks.flatten(0, 1), x_q).float())
            support = of_each.unflatten(0, support_masks.shape[:2]).mean(1)
        else:
            query = masked_average_pool(output.query_feature, (output.feature_logits > 0).float())
            support = output.support_prototype.float()
            counted = counted & (query.detach().abs().amax((1, 2, 3)) > 0).unsqueeze(1)
        if 0 < self.pcl_drawn < bank.capacity:
            counted = drawn(counted, self.pcl_drawn)
        return prototypical_contrastive_loss(
            query.flatten(1), support.flatten(1), stored, counted, self.pcl_temperature
        )


def drawn(stored: Tensor, count: int) -> Tensor:
    """At most ``count`` true entries of each row of ``stored`` (B, N), chosen at random; the others become false.

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
    """Negatives of eq. 10 in the query and in every support, (B, 1 + K, C); zero where the region is empty.

    The query's target is the prediction y_ini, a support's its mask; 255 in a support belongs to no region. Given
    the ``query_masks`` (B, H, W) it is the authors' form instead: the query's target is its mask as well, masks are
    resized by nearest neighbour, and 255 is not target.

        do: neither background nor target (eq. 7)    bg: background, not target    non_target: all but the target
    """
    bg_q, bg_s, initial = output.query_bg_logits, output.support_bg_logits, output.initial_logits
    x_q, x_s = output.query_feature, output.support_features
    if bg_q is None or bg_s is None or initial is None or x_s is None:
        raise ValueError("the contrastive loss needs the background and the initial prediction: bgem and doem")
    size, masks_s = (x_q.shape[-2], x_q.shape[-1]), support_masks.flatten(0, 1)
    if query_masks is None:
        target_q, target_s = resize(initial, size) > 0, foreground(masks_s, size) > 0
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
