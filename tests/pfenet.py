"""PFENet written a second time, as functions of its state dict: two classes, plain concatenation, naive backbones.

The oracle of the tests of the model and of scripts/convert_pfenet.py. The head has PFENet's own parameter names, the
backbones those of a weights file (torchvision's, or the lineage's with a deep stem).
"""

import math
import re

import torch
import torch.nn.functional as F


def pfenet(naive, head, query, supports, masks, scales):
    """PFENet as published -> two-class logits at the image's size, prior, P^s and two-class logits a scale."""
    query2, query3 = naive.features(query)
    query_feature = conv2d(head, "down_query.0", torch.cat([query3, query2], 1)).relu()
    query_high = naive.high(query3)
    prototypes, priors = [], []
    for k in range(supports.shape[1]):
        support2, support3 = naive.features(supports[:, k])
        mask = bilinear((masks[:, k : k + 1] == 1).float(), tuple(support3.shape[-2:]))
        feature = conv2d(head, "down_supp.0", torch.cat([support3, support2], 1)).relu()
        prototypes.append((feature * mask).sum((2, 3), keepdim=True) / (mask.sum((2, 3), keepdim=True) + 0.0005))
        support_high = naive.high(support3 * mask) * mask
        similarity = []
        for q, s in zip(query_high.flatten(2), support_high.flatten(2), strict=True):  # (C, hw) each
            cosine = (s.T @ q) / (s.norm(dim=0)[:, None] * q.norm(dim=0)[None, :] + 1e-7)
            best = cosine.max(0).values
            similarity.append((best - best.min()) / (best.max() - best.min() + 1e-7))
        priors.append(torch.stack(similarity).view(len(query), 1, *query_high.shape[-2:]))
    prototype, prior = sum(prototypes) / len(prototypes), sum(priors) / len(priors)
    out, inner = pfenet_fem(head, query_feature, prototype, prior, scales)
    return bilinear(out, tuple(query.shape[-2:])), prior, prototype, inner


def pfenet_head(channels, scales, with_prior, middle_channels=0):
    """Random weights of PFENet's head under its own names; of the FEM part only without ``middle_channels``."""
    head = {}
    if middle_channels:
        add_conv(head, "down_query.0", channels, middle_channels, 1)
        add_conv(head, "down_supp.0", channels, middle_channels, 1)
    for i in range(len(scales)):
        add_conv(head, f"init_merge.{i}.0", channels, 2 * channels + with_prior, 1)
        add_pair(head, f"beta_conv.{i}", channels)
        add_classifier(head, f"inner_cls.{i}", channels)
        if i > 0:
            add_conv(head, f"alpha_conv.{i - 1}.0", channels, 2 * channels, 1)
    add_conv(head, "res1.0", channels, channels * len(scales), 1)
    add_pair(head, "res2", channels)
    add_classifier(head, "cls", channels)
    return head


def pfenet_fem(head, feature, prototype, prior, scales):
    """PFENet's feature enrichment -> two-class logits at the feature's size, and one a scale."""
    h, w = feature.shape[-2:]
    inputs = []
    for scale in scales:
        pooled = F.adaptive_avg_pool2d(feature, scale_size(scale, h, w))
        maps = [] if prior is None else [bilinear(prior, tuple(pooled.shape[-2:]))]
        inputs.append(torch.cat([pooled, expand_to(prototype, pooled), *maps], 1))
    return enrich(head, inputs, (h, w))


def enrich(head, inputs, size):
    """Everything after the concatenation at each scale -> two-class logits at ``size``, and one a scale."""
    pyramid, inner = [], []
    for i, x in enumerate(inputs):
        merged = conv_relu(head, f"init_merge.{i}.0", x)
        if i > 0:
            previous = bilinear(pyramid[i - 1], tuple(x.shape[-2:]))
            merged = conv_relu(head, f"alpha_conv.{i - 1}.0", torch.cat([merged, previous], 1)) + merged
        merged = residual_pair(head, f"beta_conv.{i}", merged)
        inner.append(classify(head, f"inner_cls.{i}", merged))
        pyramid.append(bilinear(merged, size))
    return classify(head, "cls", residual_pair(head, "res2", conv_relu(head, "res1.0", torch.cat(pyramid, 1)))), inner


def scale_size(scale, h, w):
    return (int(h * scale), int(w * scale)) if scale <= 1 else (scale, scale)


def add_conv(head, name, outputs, inputs, kernel):
    head[f"{name}.weight"] = torch.randn(outputs, inputs, kernel, kernel) * math.sqrt(2 / (inputs * kernel**2))


def add_pair(head, name, channels):
    add_conv(head, f"{name}.0", channels, channels, 3)
    add_conv(head, f"{name}.2", channels, channels, 3)


def add_classifier(head, name, channels):
    """Two classes; the numbers in the names count ReLU and dropout between the convolutions."""
    add_conv(head, f"{name}.0", channels, channels, 3)
    add_conv(head, f"{name}.3", 2, channels, 1)
    head[f"{name}.3.bias"] = torch.randn(2)


def conv_relu(head, name, x):
    return conv2d(head, name, x).relu()


def residual_pair(head, name, x):
    return conv_relu(head, f"{name}.2", conv_relu(head, f"{name}.0", x)) + x


def classify(head, name, x):
    return conv2d(head, f"{name}.3", conv_relu(head, f"{name}.0", x))


class NaiveResNet:
    """Output stride 8: stages 3 and 4 at stride 1, every 3x3 of theirs dilated by 2 and 4."""

    def __init__(self, state):
        self.state = state

    def unit(self, conv, bn, x, **kwargs):
        return batch_norm(self.state, bn, conv2d(self.state, conv, x, **kwargs))

    def stage(self, n, x):
        stride, dilation = {1: (1, 1), 2: (2, 1), 3: (1, 2), 4: (1, 4)}[n]
        i = 0
        while f"layer{n}.{i}.conv1.weight" in self.state:
            block, s = f"layer{n}.{i}", stride if i == 0 else 1
            y = self.unit(f"{block}.conv1", f"{block}.bn1", x).relu()
            y = self.unit(f"{block}.conv2", f"{block}.bn2", y, stride=s, dilation=dilation).relu()
            y = self.unit(f"{block}.conv3", f"{block}.bn3", y)
            if i == 0:
                x = self.unit(f"{block}.downsample.0", f"{block}.downsample.1", x, stride=s)
            x = (x + y).relu()
            i += 1
        return x

    def features(self, images):
        x = self.unit("conv1", "bn1", images, stride=2).relu()
        for n in ("2", "3"):
            if f"conv{n}.weight" in self.state:
                x = self.unit(f"conv{n}", f"bn{n}", x).relu()
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        stage2 = self.stage(2, self.stage(1, x))
        return stage2, self.stage(3, stage2)

    def high(self, stage3):
        return self.stage(4, stage3)


class NaiveVGG:
    """Pools rounded up after each of the first four stages."""

    def __init__(self, state):
        self.state = state

    def convolutions(self, stage, x):
        index = sum(3 * len(s) + 1 for s in VGG_STAGES[:stage])
        for i in range(len(VGG_STAGES[stage])):
            x = conv2d(self.state, f"features.{index + 3 * i}", x)
            x = batch_norm(self.state, f"features.{index + 3 * i + 1}", x).relu()
        return x

    def features(self, images):
        pooled = []
        for stage in range(4):
            images = F.max_pool2d(self.convolutions(stage, images), 2, stride=2, ceil_mode=True)
            pooled.append(images)
        return bilinear(pooled[2], tuple(pooled[3].shape[-2:])), pooled[3]

    def high(self, stage3):
        return self.convolutions(4, stage3)


def resnet_shapes(*, deep, blocks=(3, 4, 6, 3)):
    """Names and shapes of a bottleneck ResNet's file: torchvision's, or the lineage's with its deep stem."""
    shapes = {}
    stem = (("1", 64, 3, 3), ("2", 64, 64, 3), ("3", 128, 64, 3)) if deep else (("1", 64, 3, 7),)
    for n, outputs, inputs, kernel in stem:
        shapes[f"conv{n}.weight"] = (outputs, inputs, kernel, kernel)
        add_batch_norm(shapes, f"bn{n}", outputs)
    channels = stem[-1][1]
    for layer, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), start=1):
        for i in range(count):
            block = f"layer{layer}.{i}"
            convolutions = (width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)
            for n, shape in enumerate(convolutions, start=1):
                shapes[f"{block}.conv{n}.weight"] = shape
                add_batch_norm(shapes, f"{block}.bn{n}", shape[0])
            if i == 0:
                shapes[f"{block}.downsample.0.weight"] = (4 * width, channels, 1, 1)
                add_batch_norm(shapes, f"{block}.downsample.1", 4 * width)
            channels = 4 * width
    shapes.update({"fc.weight": (1000, channels), "fc.bias": (1000,)})
    return shapes


VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg_shapes():
    shapes, index, channels = {}, 0, 3
    for stage in VGG_STAGES:
        for outputs in stage:
            shapes[f"features.{index}.weight"] = (outputs, channels, 3, 3)
            shapes[f"features.{index}.bias"] = (outputs,)
            add_batch_norm(shapes, f"features.{index + 1}", outputs)
            index, channels = index + 3, outputs
        index += 1  # the pool
    shapes.update({"classifier.6.weight": (1000, 4096), "classifier.6.bias": (1000,)})
    return shapes


def add_batch_norm(shapes, name, channels):
    shapes.update({f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")})


def random_state(shapes):
    """Weights with which features stay of about unit size through the network."""
    state = {}
    for name, shape in shapes.items():
        if len(shape) == 4:
            state[name] = torch.randn(shape) * math.sqrt(2 / (shape[1] * shape[2] * shape[3]))
        elif name.endswith("running_var"):
            state[name] = torch.rand(shape) + 0.5
        elif name.endswith("weight"):
            state[name] = (torch.rand(shape) + 0.5) * (0.3 if ".bn3." in name else 1)
        else:
            state[name] = torch.randn(shape) * 0.1
    return state


def hollow_state(shapes):
    """Tensors of the right shapes that take no room in a file."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def episode(batch=2, shots=2, size=(65, 65)):
    """Smooth random images, and a rectangle in each support as its mask."""
    images = bilinear(torch.randn(batch * (1 + shots), 3, size[0] // 6, size[1] // 6) * 1.5, size)
    images = images + 0.2 * torch.randn_like(images)
    masks = torch.zeros(batch, shots, *size, dtype=torch.long)
    for mask in masks.flatten(0, 1):
        top, left = (int(torch.randint(0, n // 2, ())) for n in size)
        height, width = (int(torch.randint(n // 4, n // 2, ())) for n in size)
        mask[top : top + height, left : left + width] = 1
    images = images.unflatten(0, (batch, 1 + shots))
    return images[:, 0].contiguous(), images[:, 1:].contiguous(), masks


def conv2d(state, name, x, stride=1, dilation=1):
    """The convolution ``name`` of a state dict, with the zero padding that keeps the size at stride 1."""
    weight = state[f"{name}.weight"]
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride=stride, padding=padding, dilation=dilation)


def batch_norm(state, name, x, eps=1e-5):
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], training=False, eps=eps)


def bilinear(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def expand_to(prototype, like):
    return prototype.expand(len(like), -1, *like.shape[-2:])


def difference(two_classes):
    return two_classes[:, 1:] - two_classes[:, :1]


def to_our_names(head, prefix=""):
    """PFENet's names, and those of authors.py -> ours; of two classes, the one logit is their difference."""
    names = [
        (r"down_query\.0", "reduce_query.0"),
        (r"down_supp\.0", "reduce_support.0"),
        (r"init_merge\.(\d)\.0", prefix + r"scales.\1.merge"),
        (r"beta_conv\.(\d)\.(\d)", prefix + r"scales.\1.refine.\2"),
        (r"inner_cls\.(\d)\.(\d)", prefix + r"scales.\1.classifier.\2"),
        (r"res1\.0", f"{prefix}fuse.0"),
        (r"res2\.(\d)", prefix + r"refine.\1"),
        (r"cls\.(\d)", prefix + r"classifier.\1"),
        (r"bg_reduce", "bgmm.conv"),
        (r"bg_pair\.(\d)", r"bgmm.refine.\1"),
        (r"bg_cls\.(\d)", r"bgmm.classifier.\1"),
        (r"bgem\.(\d)", r"eliminations.\1.bgem.conv"),
        (r"fm\.(\d)", r"eliminations.\1.matching.conv"),
        (r"fm_pair\.(\d)\.(\d)", r"eliminations.\1.matching.refine.\2"),
        (r"ini_cls\.(\d)\.(\d)", r"eliminations.\1.matching.initial.\2"),
    ]
    ours = {}
    for name, value in head.items():
        module, parameter = name.rsplit(".", 1)
        if match := re.fullmatch(r"alpha_conv\.(\d)\.0", module):
            ours[f"{prefix}scales.{int(match[1]) + 1}.inter_scale.0.{parameter}"] = value
            continue
        (new,) = (re.sub(old, new, module) for old, new in names if re.fullmatch(old, module))
        ours[f"{new}.{parameter}"] = value[1:] - value[:1] if re.search(r"cls\.(\d\.)?3$", module) else value
    assert len(ours) == len(head)
    return ours
