"""A CNN in a stem and four stages as a backbone: ResNet, VGG, EfficientNet-Lite."""

import torch
from torch import Tensor, nn

from model.backbone import Backbone
from model.ops import foreground, resize


class StagedCNN(Backbone):
    """Middle features are stage 3 (+) stage 2, in this order as in PFENet; high features are stage 4.

    Args:
        stages: the stem and stages 1 to 4; stages 3 and 4 have one stride.
        channels: of stages 2, 3 and 4.
    """

    stem: nn.Module
    stage1: nn.Module
    stage2: nn.Module
    stage3: nn.Module
    stage4: nn.Module

    def __init__(self, stages: list[nn.Module], *, channels: tuple[int, int, int], stride: int = 8) -> None:
        second, self.third, high = channels
        named = dict(zip(("stem", "stage1", "stage2", "stage3", "stage4"), stages, strict=True))
        super().__init__(named, middle_channels=self.third + second, high_channels=high, stride=stride, sides=(8, 1))

    @torch.no_grad()
    def middle(self, images: Tensor) -> Tensor:
        """Map normalised RGB images (N, 3, H, W) to stage 3 (+) stage 2, (N, middle_channels, h, w)."""
        second = self.stage2(self.stage1(self.stem(images.contiguous(memory_format=torch.channels_last))))
        third = self.stage3(second)
        return torch.cat([third, resize(second, (third.shape[-2], third.shape[-1]))], 1)

    @torch.no_grad()
    def high(self, middle: Tensor, masks: Tensor | None = None) -> Tensor:
        """Apply stage 4 to the stage 3 in ``middle``; of supports, the target is cut out before and after it."""
        third = middle[:, : self.third].contiguous(memory_format=torch.channels_last)
        if masks is None:
            return self._stage4(third)
        target = foreground(masks, (third.shape[-2], third.shape[-1])).to(third.dtype)
        return self._stage4(third * target) * target

    def _stage4(self, third: Tensor) -> Tensor:
        if third.is_cuda or len(third) == 1:
            return self.stage4(third)
        return torch.cat([self.stage4(one) for one in third.split(1)])  # a batch gains nothing on a CPU but memory
