"""The authors' network written a second time from its description: two classes, plain concatenation, names of its own.

Differences from the paper: the elimination runs at each of FEM's scales; BGMM is a 1x1 convolution, a
residual pair of 3x3 convolutions and a classifier; a residual pair follows FM's 1x1 convolution; P_BG starts at zero;
P_DO is a mean over all positions. Also its losses of one shot, on two classes, and the steps of SGD.
"""

import torch
import torch.nn.functional as F

from tests.pfenet import (
    add_classifier,
    add_conv,
    add_pair,
    bilinear,
    classify,
    conv_relu,
    difference,
    enrich,
    expand_to,
    pfenet_fem,
    pfenet_head,
    residual_pair,
    scale_size,
)


def authors_head(channels, scales, middle_channels=0):
    """Random weights; FEM's and, with ``middle_channels``, those of the two reductions have PFENet's names."""
    head = pfenet_head(channels, scales, with_prior=False, middle_channels=middle_channels)
    head["p_bg"] = torch.randn(1, channels, 1, 1)
    add_conv(head, "bg_reduce", channels, 2 * channels, 1)
    add_pair(head, "bg_pair", channels)
    add_classifier(head, "bg_cls", channels)
    for i in range(len(scales)):
        add_conv(head, f"bgem.{i}", channels, 2 * channels, 1)
        add_conv(head, f"fm.{i}", channels, 2 * channels + 1, 1)
        add_pair(head, f"fm_pair.{i}", channels)
        add_classifier(head, f"ini_cls.{i}", channels)
    return head


def authors_forward(head, x_q, x_s, p_s, prior, scales):
    """X^q (B, C, h, w), X^s (B, K, C, h, w), P^s, C_p -> two-class logits: y, y_BG^q, y_BG^s, y_ini and y a scale."""
    h, w = x_q.shape[-2:]

    def background(x):
        hidden = conv_relu(head, "bg_reduce", torch.cat([x, expand_to(head["p_bg"], x)], 1))
        return classify(head, "bg_cls", residual_pair(head, "bg_pair", hidden))

    bg_q, bg_s = background(x_q), torch.stack([background(x) for x in x_s.unbind(1)], 1)
    initial, inputs = [], []
    for i, scale in enumerate(scales):
        size = scale_size(scale, h, w)
        x = F.adaptive_avg_pool2d(x_q, size)
        no_background = conv_relu(head, f"bgem.{i}", torch.cat([x, expand_to(head["p_bg"], x)], 1))
        matched = torch.cat([no_background, expand_to(p_s, x), bilinear(prior, size)], 1)
        activated = residual_pair(head, f"fm_pair.{i}", conv_relu(head, f"fm.{i}", matched))
        initial.append(classify(head, f"ini_cls.{i}", activated))
        is_background, is_target = (y.argmax(1, keepdim=True) for y in (bilinear(bg_q, size), initial[-1]))
        distracting = (1 - torch.maximum(is_background, is_target)).float()
        p_do = F.adaptive_avg_pool2d(x * distracting, 1)
        inputs.append(torch.cat([activated, expand_to(p_do, x)], 1))
    y, inner = enrich(head, inputs, (h, w))
    return y, bg_q, bg_s, initial, inner


def authors_contrast(x_q, x_s, y, bg_q, bg_s, query_masks, support_masks, class_ids, bank):
    """Their contrastive loss of one shot; ``bank``: class id -> list of prototypes, added to in place.

    P^q is pooled over the final prediction, of logits y; the query's mask only tells its distracting objects. Masks are
    resized by nearest neighbour. Every region's prototype is stored, an empty one as zeros.
    """
    size = x_q.shape[-2:]
    target_q, target_s = (
        F.interpolate(m[:, None].float(), size, mode="nearest") == 1 for m in (query_masks, support_masks)
    )

    def prototypes(feature, region):
        return (feature * region).sum((2, 3)) / (region.sum((2, 3)) + 0.0005)

    do_q = prototypes(x_q, ~((bg_q > 0) | target_q))
    do_s = prototypes(x_s, ~((bg_s > 0) | target_s))
    for found in (do_q, do_s):
        for class_id, prototype in zip(class_ids.tolist(), found.detach(), strict=True):
            bank.setdefault(class_id, []).append(prototype)
    total = 0
    for p_q, p_s, class_id in zip(prototypes(x_q, y > 0), prototypes(x_s, target_s), class_ids.tolist(), strict=True):
        positive = F.cosine_similarity(p_q, p_s, dim=0).exp()
        negative = sum(F.cosine_similarity(p_q, n, dim=0).exp() for n in bank[class_id])
        total = total - (positive / negative).log()
    return total / len(class_ids)


def authors_loss(head, features, masks, prior, class_ids, bank, scales, gamma):
    """Total loss of one shot from middle features (query, support), masks (query, support) and C_p."""
    (x_q, x_s), (masks_q, masks_s) = reduced(head, features), masks
    y, bg_q, bg_s, initial, inner = authors_forward(
        head, x_q, x_s[:, None], support_prototype(x_s, masks_s), prior, scales
    )
    bg_s = bg_s[:, 0]
    logits = (difference(x) for x in (y, bg_q, bg_s))
    contrast = authors_contrast(x_q, x_s, *logits, masks_q, masks_s, class_ids, bank)
    return (
        cross_entropy(y, masks_q)
        + 0.6 * sum(cross_entropy(x, masks_q) for x in initial) / len(scales)
        + 0.4 * sum(cross_entropy(x, masks_q) for x in inner) / len(scales)
        + background_loss(torch.cat([bg_q, bg_s]), torch.cat([masks_q, masks_s]))
        + gamma * contrast
    )


def pfenet_loss(head, features, masks, prior, scales):
    """PFENet's, with the weight of the scales' predictions that the authors' code has."""
    (x_q, x_s), (masks_q, masks_s) = reduced(head, features), masks
    y, inner = pfenet_fem(head, x_q, support_prototype(x_s, masks_s), prior, scales)
    return cross_entropy(y, masks_q) + 0.4 * sum(cross_entropy(x, masks_q) for x in inner) / len(scales)


def reduced(head, features):
    return (conv_relu(head, name, x) for name, x in zip(("down_query.0", "down_supp.0"), features, strict=True))


def support_prototype(x_s, masks):
    target = bilinear((masks == 1).float()[:, None], tuple(x_s.shape[-2:]))
    return (x_s * target).sum((2, 3), keepdim=True) / (target.sum((2, 3), keepdim=True) + 0.0005)


def cross_entropy(logits, masks):
    return F.cross_entropy(bilinear(logits, tuple(masks.shape[-2:])), masks, ignore_index=255)


def background_loss(logits, masks):
    """Ignored pixels count in the second term."""
    other, background = F.log_softmax(bilinear(logits, tuple(masks.shape[-2:])), 1).unbind(1)
    target = (masks == 1).float()
    on_target = -(other * target).sum((1, 2)) / target.sum((1, 2))
    return (on_target - 0.5 * background.mean((1, 2))).mean()


def sgd(weights, velocity, loss, lr, momentum, decay):
    """One step in place; ``velocity`` is empty at first."""
    gradients = torch.autograd.grad(loss, list(weights.values()))
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        velocity[name] = momentum * velocity.get(name, 0) + gradient + decay * weight.detach()
        weight.data -= lr * velocity[name]
