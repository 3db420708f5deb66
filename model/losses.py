"""The paper's losses: one pure function an equation, then :class:`NTRELoss` that puts them together.

Shapes: B batch, K shots, C channels, (H, W) mask side, (h, w) feature side. Masks are integer: 1 target,
0 other, 255 ignored. Predictions are logits, so every logarithm is taken in its stable form,
-log(sigmoid(x)) = softplus(-x) and -log(1 - sigmoid(x)) = softplus(x).
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.doem import distracting_object_mask
from model.ntrenet import NTRENetOutput
from model.ops import IGNORE, foreground, masked_average_pool, resize
from model.parallel import gathered, mean_over_batch
from model.prototype_bank import PrototypeBank

Negatives = Literal["do", "bg", "non_target"]


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


def background_mining_loss(bg_logits: Tensor, masks: Tensor, alpha: float) -> Tensor:
    """L_BG: no background on the target, but some background in every image.

        L_BG = - 1/N sum_i log(1 - y_BG(i)) M(i)  -  alpha 1/Z sum_j log(y_BG(j))                       (eq. 3)

    N counts the target's pixels, Z all pixels, ignored ones (255) in neither; an image without target pixels
    has the second term only. The mean over the images is returned.

    Args:
        bg_logits: (N, 1, h, w), resized to the masks
        masks: (N, H, W), of queries and supports alike
    """
    logits = resize(bg_logits.float(), (masks.shape[-2], masks.shape[-1])).squeeze(1)
    target, valid = masks == 1, masks != IGNORE
    foreign = F.softplus(logits)  # -log(1 - y_BG); -log(y_BG) is softplus(-x) = softplus(x) - x
    on_target = foreign.where(target, 0).sum((1, 2)) / target.sum((1, 2)).clamp_min(1)
    everywhere = (foreign - logits).where(valid, 0).sum((1, 2)) / valid.sum((1, 2)).clamp_min(1)
    return mean_over_batch((on_target + alpha * everywhere).sum(), len(masks))


def prototypical_contrastive_loss(query: Tensor, support: Tensor, negatives: Tensor, stored: Tensor) -> Tensor:
    """L_PCL: the query's target prototype is like the support's and unlike those of distracting objects.

        L_PCL = -log( exp cos(P^q, P^s) / sum_B exp cos(P^q, P_DO) )                                    (eq. 10)

    As printed: cosine without temperature, and the positive is not part of the denominator. An episode whose
    P^q is zero (nothing was predicted) or whose bank is empty adds nothing; the sum is divided by B.

    Args:
        query, support: P^q and P^s, (B, C)
        negatives: prototypes of the bank for each episode's class, (B, N, C)
        stored: which of them are there, (B, N), boolean
    """
    positive = F.cosine_similarity(query, support, dim=1)
    similarity = torch.bmm(F.normalize(negatives, dim=2), F.normalize(query, dim=1).unsqueeze(2)).squeeze(2)
    denominator = similarity.masked_fill(~stored, -torch.inf).logsumexp(1)
    counts = stored.any(1) & (query.detach().abs().amax(1) > 0)
    return mean_over_batch(torch.where(counts, denominator - positive, 0).sum(), len(query))


class LossTerms(NamedTuple):
    """Scalars. ``total`` is what is minimised; the others are its terms before their weights, 0 where switched off."""

    total: Tensor
    final: Tensor
    initial: Tensor
    fem_aux: Tensor
    bg: Tensor
    pcl: Tensor


class NTRELoss(nn.Module):
    """Total training loss, with the prototype bank that eq. 10 needs.

        L_T = BCE(y_ini, M) + BCE(y, M)                                                                 (eq. 12)
        L   = beta L_T + lambda L_BG + gamma L_PCL  (+ beta fem_aux mean over FEM's scales of BCE)      (eq. 11)

    The terms follow the output: without y_BG or y_ini (the ablations) theirs are 0; where y_ini is predicted at
    several scales, its term is their mean.

    Args:
        bank: None switches PCL off.
        beta, lambda_bg, gamma: weights of eq. 11 (the paper leaves them open; gamma = 0.01 is the authors' code).
        alpha: weight inside eq. 3.
        fem_aux: weight of FEM's per-scale predictions (0.4 in the authors' code; the paper is silent).
        pcl_negatives: what the bank stores (Table 4): prototypes of distracting objects, of the background, or
            of everything that is not the target.
    """

    def __init__(
        self,
        *,
        bank: PrototypeBank | None,
        alpha: float = 0.5,
        beta: float = 1.0,
        lambda_bg: float = 1.0,
        gamma: float = 0.01,
        fem_aux: float = 0.4,
        pcl_negatives: Negatives = "do",
    ) -> None:
        super().__init__()
        self.bank = bank
        self.alpha, self.beta, self.lambda_bg, self.gamma, self.fem_aux = alpha, beta, lambda_bg, gamma, fem_aux
        self.pcl_negatives: Negatives = pcl_negatives

    def forward(
        self, output: NTRENetOutput, query_masks: Tensor, support_masks: Tensor, class_ids: Tensor
    ) -> LossTerms:
        """Loss of one batch; stores its negative prototypes in the bank first, then takes eq. 10.

        Args:
            output: of the model
            query_masks: (B, H, W)
            support_masks: (B, K, H, W)
            class_ids: (B,), from 1
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
            bg = background_mining_loss(logits.flatten(0, 1), masks.flatten(0, 1), self.alpha)
        pcl = zero if self.bank is None else self._contrast(self.bank, output, support_masks, class_ids)
        total = self.beta * (initial + final + self.fem_aux * fem_aux) + self.lambda_bg * bg + self.gamma * pcl
        return LossTerms(total, final, initial, fem_aux, bg, pcl)

    def _contrast(self, bank: PrototypeBank, output: NTRENetOutput, support_masks: Tensor, class_ids: Tensor) -> Tensor:
        shots = support_masks.shape[1]
        negatives = negative_prototypes(output, support_masks, self.pcl_negatives)
        bank.store(gathered(negatives).flatten(0, 1), gathered(class_ids).repeat_interleave(1 + shots))
        query = masked_average_pool(output.query_feature, (output.feature_logits > 0).float())
        stored, filled = bank.of_classes(class_ids)
        return prototypical_contrastive_loss(
            query.flatten(1), output.support_prototype.float().flatten(1), stored, filled
        )


@torch.no_grad()
def negative_prototypes(output: NTRENetOutput, support_masks: Tensor, kind: Negatives) -> Tensor:
    """Negatives of eq. 10 in the query and in every support, (B, 1 + K, C); zero where the region is empty.

    The query's target is the prediction y_ini, a support's its mask; 255 in a support belongs to no region.

        do: neither background nor target (eq. 7)    bg: background, not target    non_target: all but the target
    """
    bg_q, bg_s, initial = output.query_bg_logits, output.support_bg_logits, output.initial_logits
    x_s = output.support_features
    if bg_q is None or bg_s is None or initial is None or x_s is None:
        raise ValueError("the contrastive loss needs the background and the initial prediction: bgem and doem")
    size = (output.query_feature.shape[-2], output.query_feature.shape[-1])
    target_s = foreground(support_masks.flatten(0, 1), size) > 0
    ignored_s = resize((support_masks.flatten(0, 1) == IGNORE).float().unsqueeze(1), size) > 0

    def region(background: Tensor, target: Tensor) -> Tensor:
        if kind == "do":
            return distracting_object_mask(background, target)
        return (background & ~target if kind == "bg" else ~target).float()

    mask_q = region(bg_q > 0, resize(initial, size) > 0)
    mask_s = region(bg_s.flatten(0, 1) > 0, target_s) * ~ignored_s
    query = masked_average_pool(output.query_feature, mask_q).flatten(1)
    support = masked_average_pool(x_s.flatten(0, 1), mask_s).flatten(1)
    return torch.cat([query.unsqueeze(1), support.unflatten(0, support_masks.shape[:2])], 1)
