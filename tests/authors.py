"""The authors' network written a second time from its description: two classes, plain concatenation, names of its own.

Where it differs from the paper: the elimination runs anew at each of FEM's scales; BGMM is a 1x1 convolution, a
residual pair of 3x3 convolutions and a classifier; a residual pair follows FM's 1x1 convolution; P_BG starts at zero;
P_DO is a mean over all positions. Also its contrastive loss, which takes the ground truth as the query's target.
"""

import math

import torch
import torch.nn.functional as F
from pfenet import bilinear, conv2d, expand_to


def authors_head(channels, scales):
    """Random weights of everything behind the two reductions."""
    head = {"p_bg": torch.randn(1, channels, 1, 1)}

    def conv(name, outputs, inputs, kernel):
        head[f"{name}.weight"] = torch.randn(outputs, inputs, kernel, kernel) * math.sqrt(2 / (inputs * kernel**2))

    def pair(name):
        conv(f"{name}.0", channels, channels, 3)
        conv(f"{name}.2", channels, channels, 3)

    def classifier(name):
        conv(f"{name}.0", channels, channels, 3)
        conv(f"{name}.3", 2, channels, 1)
        head[f"{name}.3.bias"] = torch.randn(2)

    conv("bg_reduce", channels, 2 * channels, 1)
    pair("bg_pair")
    classifier("bg_cls")
    for i in range(len(scales)):
        conv(f"bgem.{i}", channels, 2 * channels, 1)
        conv(f"fm.{i}", channels, 2 * channels + 1, 1)
        pair(f"fm_pair.{i}")
        classifier(f"ini_cls.{i}")
        conv(f"init_merge.{i}", channels, 2 * channels, 1)
        pair(f"beta_conv.{i}")
        classifier(f"inner_cls.{i}")
        if i > 0:
            conv(f"alpha_conv.{i}", channels, 2 * channels, 1)
    conv("res1", channels, channels * len(scales), 1)
    pair("res2")
    classifier("cls")
    return head


def authors_forward(head, x_q, x_s, p_s, prior, scales):
    """X^q (B, C, h, w), X^s (B, K, C, h, w), P^s, C_p -> two-class logits: y, y_BG^q, y_BG^s, y_ini and y a scale."""
    h, w = x_q.shape[-2:]

    def conv_relu(name, x):
        return conv2d(head, name, x).relu()

    def pair(name, x):
        return conv_relu(f"{name}.2", conv_relu(f"{name}.0", x)) + x

    def classify(name, x):
        return conv2d(head, f"{name}.3", conv_relu(f"{name}.0", x))

    def background(x):
        hidden = conv_relu("bg_reduce", torch.cat([x, expand_to(head["p_bg"], x)], 1))
        return classify("bg_cls", pair("bg_pair", hidden))

    bg_q, bg_s = background(x_q), torch.stack([background(x) for x in x_s.unbind(1)], 1)
    pyramid, inner, initial = [], [], []
    for i, scale in enumerate(scales):
        size = (int(h * scale), int(w * scale)) if scale <= 1 else (scale, scale)
        x = F.adaptive_avg_pool2d(x_q, size)
        no_background = conv_relu(f"bgem.{i}", torch.cat([x, expand_to(head["p_bg"], x)], 1))
        matched = torch.cat([no_background, expand_to(p_s, x), bilinear(prior, size)], 1)
        activated = pair(f"fm_pair.{i}", conv_relu(f"fm.{i}", matched))
        initial.append(classify(f"ini_cls.{i}", activated))
        is_background, is_target = (y.argmax(1, keepdim=True) for y in (bilinear(bg_q, size), initial[-1]))
        distracting = (1 - torch.maximum(is_background, is_target)).float()
        p_do = F.adaptive_avg_pool2d(x * distracting, 1)
        merged = conv_relu(f"init_merge.{i}", torch.cat([activated, expand_to(p_do, x)], 1))
        if i > 0:
            merged = conv_relu(f"alpha_conv.{i}", torch.cat([merged, bilinear(pyramid[i - 1], size)], 1)) + merged
        merged = pair(f"beta_conv.{i}", merged)
        inner.append(classify(f"inner_cls.{i}", merged))
        pyramid.append(bilinear(merged, (h, w)))
    y = classify("cls", pair("res2", conv_relu("res1", torch.cat(pyramid, 1))))
    return y, bg_q, bg_s, initial, inner


def authors_to_our_names(head):
    """The same weights under the names of model/; of two classes, the one logit is their difference."""
    ours = {"bgmm.prototype": head["p_bg"]}
    for name, value in head.items():
        first, _, rest = name.partition(".")
        scale, _, tail = rest.partition(".")
        part = {
            "bg_reduce": f"bgmm.conv.{rest}",
            "bg_pair": f"bgmm.refine.{rest}",
            "bg_cls": f"bgmm.classifier.{rest}",
            "bgem": f"eliminations.{scale}.bgem.conv.{tail}",
            "fm": f"eliminations.{scale}.matching.conv.{tail}",
            "fm_pair": f"eliminations.{scale}.matching.refine.{tail}",
            "ini_cls": f"eliminations.{scale}.matching.initial.{tail}",
            "init_merge": f"fem.scales.{scale}.merge.{tail}",
            "alpha_conv": f"fem.scales.{scale}.inter_scale.0.{tail}",
            "beta_conv": f"fem.scales.{scale}.refine.{tail}",
            "inner_cls": f"fem.scales.{scale}.classifier.{tail}",
            "res1": f"fem.fuse.0.{rest}",
            "res2": f"fem.refine.{rest}",
            "cls": f"fem.classifier.{rest}",
        }.get(first)
        if part is not None:
            # their classifiers count ReLU and dropout between the convolutions, and so do ours
            ours[part] = value[1:] - value[:1] if len(value) == 2 else value
    return ours


def authors_contrast(x_q, x_s, bg_q, bg_s, query_masks, support_masks, class_ids, bank):
    """Their contrastive loss of one shot; ``bank``: class id -> list of prototypes, added to in place.

    Masks are resized by nearest neighbour. Every region's prototype is stored, an empty one as zeros.
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
    for p_q, p_s, class_id in zip(
        prototypes(x_q, target_q), prototypes(x_s, target_s), class_ids.tolist(), strict=True
    ):
        positive = F.cosine_similarity(p_q, p_s, dim=0).exp()
        negative = sum(F.cosine_similarity(p_q, n, dim=0).exp() for n in bank[class_id])
        total = total - (positive / negative).log()
    return total / len(class_ids)
