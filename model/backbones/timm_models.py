"""Any network of timm (pip install timm): 'timm:vit_small_patch14_dinov2.lvd142m', a ViT, a Swin or a CNN.

High features are the network's last. Middle features are two before them: stages 2 and 3 of 4, or those at a half and
three quarters of a network whose blocks all have one size. timm's own final norm is applied to a ViT's.
"""

import difflib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from model.backbone import Backbone, Source
from model.ops import foreground, resize
from model.torchvision_compat import import_models
from model.weights import WeightsError, fetched

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPTIONS: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"output_stride": 8}, {})
"""of timm's networks, the first that a network knows: ViTs take images of any size, CNNs give larger feature maps"""


def source(name: str) -> Source:
    """Return the source of 'timm:NAME'."""
    timm, name = _timm(), name.partition(":")[2]
    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        near = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), 3)
        raise WeightsError(f"timm has no network '{name}'; near are {', '.join(near) or 'none'}") from None
    classifier = config.classifier or ()
    names = (classifier,) if isinstance(classifier, str) else classifier
    return Source(
        build=lambda deep_stem: _build(timm, name),
        cut=lambda network: TimmBackbone(network, name, config.mean, config.std),
        imagenet=lambda folder: _fetch(name, config, folder),
        unused=tuple(f"{prefix}." for prefix in names),
        renamed=_renamed,
        fuses=False,
    )


def _timm() -> ModuleType:
    import_models()  # timm imports torchvision
    try:
        return import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise WeightsError(
            "backbones 'timm:...' need a package that is not installed: run 'pip install timm'"
        ) from None


def _build(timm: ModuleType, name: str) -> nn.Module:
    for options in OPTIONS:
        try:
            network: nn.Module = timm.create_model(name, num_classes=0, **options)
        except TypeError:  # an unknown option
            continue
        return network
    raise WeightsError(f"timm cannot build {name} without a classifier; take another backbone")


def _fetch(name: str, config: Any, folder: Path) -> Path:
    if not (config.url or config.hf_hub_id):
        raise WeightsError(f"timm has no weights for {name}: give a file, or a name with a tag such as {name}.in1k")
    url = (
        f"https://huggingface.co/{config.hf_hub_id}/resolve/main/model.safetensors" if config.hf_hub_id else config.url
    )
    return fetched(url, folder / f"{name}{Path(url).suffix}", f"timm:{name}")


def _renamed(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the entries of other sources' files, such as DINOv2's own, as timm does."""
    module = import_module(type(network).__module__)
    rename: Callable[..., dict[str, Tensor]] = getattr(module, "checkpoint_filter_fn", lambda state, network: state)
    try:
        return rename(dict(state), network)
    except Exception:  # a file of another network; what does not fit is said when it is loaded
        return state


class TimmBackbone(Backbone):
    """A network of timm. ``middle`` carries the last features as well, from which ``high`` cuts the target."""

    shift: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        network.eval()
        levels: Any = network.feature_info
        reductions = [level["reduction"] for level in levels]
        count, step = len(reductions), max(reductions)
        self.levels = list(range(count))[-3:]
        if len(set(reductions)) == 1:
            self.levels = sorted({max(0, part * count // 4 - 1) for part in (2, 3, 4)})
        side = 4 * step
        try:
            with torch.no_grad():
                maps = self._levels(network, torch.zeros(1, 3, side, 2 * side))
        except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
            raise WeightsError(f"{name} cannot be a backbone: it does not take images of any size ({error})") from error
        channels, side_of_map = [level.shape[1] for level in maps], maps[0].shape[-2]
        if len(maps) < 2 or any(level.shape[-1] != 2 * level.shape[-2] or side % level.shape[-2] for level in maps):
            raise WeightsError(f"{name} cannot be a backbone: its feature maps are no even parts of the image")
        super().__init__(
            {"network": network},
            middle_channels=sum(channels[:-1]),
            high_channels=channels[-1],
            carried_channels=channels[-1],
            stride=side // side_of_map,
            sides=(step, 0),
        )
        given, wanted = (
            (torch.tensor(values)[:, None, None] for values in pair)
            for pair in ((IMAGENET_MEAN, IMAGENET_STD), (mean, std))
        )
        (mean_in, std_in), (mean_out, std_out) = given, wanted
        self.register_buffer("scale", std_in / std_out, persistent=False)
        self.register_buffer("shift", (mean_in - mean_out) / std_out, persistent=False)

    def _levels(self, network: Any, images: Tensor) -> list[Tensor]:
        return network.forward_intermediates(images, indices=self.levels, norm=True, intermediates_only=True)

    @torch.no_grad()
    def middle(self, images: Tensor) -> Tensor:
        """Map normalised RGB images (N, 3, H, W) to the features of all three depths, at the size of the largest."""
        levels = self._levels(self.network, images * self.scale + self.shift)
        size = (levels[0].shape[-2], levels[0].shape[-1])
        return torch.cat([resize(level, size) for level in levels], 1)

    @torch.no_grad()
    def high(self, middle: Tensor, masks: Tensor | None = None) -> Tensor:
        """Return the last features; of supports, zero off the target. They have seen the whole image."""
        high = middle[:, self.middle_channels :]
        return high if masks is None else high * foreground(masks, (high.shape[-2], high.shape[-1])).to(high.dtype)
