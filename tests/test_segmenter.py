"""The segmenter against the network's own forward, a user's images and masks, and a host program that imports it."""

from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from model.ntrenet import NTRENetOutput
from tests.harness import ROOT, process
from tests.scenes import SIDE, scene, spread, write_checkpoint
from util.data.images import encoded
from util.errors import UserError
from util.photos.segmenter import NTRESegmenter, Segmentation

SUPPORTS = [scene(1), scene(2, 40, 90), scene(3, 130, 70)]
SUPPORTS[1][1][:] = True  # a target that fills its image: only the padding is not target
QUERY = scene(4, 50, 97)[0]


def fitted(image: np.ndarray, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The network's square: the longer side fills it, both sides rounded down to 8; normalised image and mask."""
    height, width = (int(side * SIDE / max(mask.shape)) // 8 * 8 for side in mask.shape)
    square, labels = np.zeros((SIDE, SIDE, 3), np.uint8), np.full((SIDE, SIDE), 255)
    square[:height, :width] = cv2.resize(image, (width, height))
    labels[:height, :width] = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normal = (square / 255 - mean) / std
    return torch.from_numpy(normal.transpose(2, 0, 1)).float(), torch.from_numpy(labels)


def at_size(square: torch.Tensor, height: int, width: int) -> np.ndarray:
    """(S, S) -> (H, W): the part that the image fills, resized."""
    h, w = (int(side * SIDE / max(height, width)) // 8 * 8 for side in (height, width))
    return F.interpolate(square[None, None, :h, :w], (height, width), mode="bilinear")[0, 0].numpy()


def forward(segmenter: NTRESegmenter, supports: list[tuple[np.ndarray, np.ndarray]]) -> NTRENetOutput:
    images, masks = zip(*(fitted(*support) for support in supports), strict=True)
    query, _ = fitted(QUERY, np.zeros(QUERY.shape[:2], bool))
    with torch.inference_mode():
        return segmenter.model(query[None], torch.stack(images)[None], torch.stack(masks)[None])


def same(a: Segmentation, b: Segmentation) -> None:
    for one, other in zip(a, b, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("supports", [SUPPORTS[:1], SUPPORTS[1:], SUPPORTS, SUPPORTS * 2], ids=len)
def test_supports_encoded_one_by_one_equal_one_forward_on_all(
    segmenter: NTRESegmenter, supports: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    size = QUERY.shape[:2]
    output = forward(segmenter, supports)
    result = segmenter.segment([image for image, _ in supports], [mask for _, mask in supports], QUERY)
    squares = {
        "prior": output.prior,
        "bg": output.query_bg_logits.sigmoid(),
        "distractor": output.eliminated[0].do_mask,
    }
    np.testing.assert_allclose(result.probability, 1 / (1 + np.exp(-at_size(output.logits[0, 0], *size))), atol=2e-5)
    for name, square in squares.items():
        full = F.interpolate(square, (SIDE, SIDE), mode="bilinear", align_corners=True)[0, 0]
        np.testing.assert_allclose(getattr(result, name), at_size(full, *size), atol=2e-5, err_msg=name)
    assert spread(result.probability) > 0.02
    assert spread(result.prior) > 0.5


def test_an_encoded_target_and_query_give_what_segment_gives(segmenter: NTRESegmenter) -> None:
    image, mask = SUPPORTS[0]
    target = segmenter.encode(image, mask)
    expected = segmenter.segment([image], [mask], QUERY)
    same(segmenter.segment_encoded(target, QUERY), expected)
    same(segmenter.segment_encoded(target, segmenter.encode_query(QUERY)), expected)
    np.testing.assert_array_equal(expected.mask, expected.probability > 0.5)
    other = segmenter.segment(image, ~mask, QUERY)
    assert np.abs(other.prior - expected.prior).max() > 0.1


@pytest.mark.parametrize("size", [(97, 50), (7, 5)])
def test_every_map_has_the_querys_own_size(segmenter: NTRESegmenter, size: tuple[int, int]) -> None:
    result = segmenter.segment(*SUPPORTS[0], np.full((*size, 3), 90, np.uint8))
    maps = [values for values in result if isinstance(values, np.ndarray)]
    assert len(maps) == 5 and 0 <= result.presence <= 1
    assert all(values.shape == size and 0 <= values.min() <= values.max() <= 1 for values in maps)


def test_an_ablation_lacks_only_the_maps_it_does_not_make(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "pfenet.pt", "model.bgem=false", "model.doem=false", "loss.pcl=0")
    result = NTRESegmenter.from_checkpoint(path, "cpu", "fp32").segment(*SUPPORTS[0], QUERY)
    assert {name for name, values in result._asdict().items() if values is None} == {"bg", "distractor"}


def test_a_mask_is_the_same_in_every_encoding(segmenter: NTRESegmenter) -> None:
    image, mask = SUPPORTS[0]
    expected = segmenter.segment(image, mask, QUERY)
    ones = mask.astype(np.uint8)
    palette = Image.fromarray(ones)
    palette.putpalette([0, 0, 0, 200, 10, 10])
    white_first = Image.fromarray(255 * ones).quantize(2)
    assert white_first.getpixel((0, 0)) == 1, "black is index 1"
    stencil = Image.fromarray(1 - ones)
    stencil.putpalette([200, 10, 10, 255, 255, 255])
    stencil.info["transparency"] = 1
    clear_grey = Image.fromarray(ones)
    clear_grey.info["transparency"] = 0
    deep = Image.fromarray(np.uint16(65535) * ones)
    jpeg = Image.open(BytesIO(encoded(Image.fromarray(255 * ones), "JPEG", quality=90)))
    alpha = Image.fromarray(image).convert("RGBA")
    alpha.putalpha(Image.fromarray(255 * ones))
    opaque = Image.fromarray(255 * ones).convert("RGBA")
    grey_alpha = Image.merge("LA", (Image.fromarray(image).convert("L"), Image.fromarray(255 * ones)))
    encodings = [255 * ones, ones.astype(float), *map(Image.fromarray, (mask, ones, 255 * ones))]
    encodings += [palette, white_first, stencil, clear_grey, alpha, alpha.quantize(64), grey_alpha, opaque, deep, jpeg]
    for encoding in [*encodings, opaque.convert("RGB"), palette.convert("RGB")]:
        same(segmenter.segment(image, encoding, QUERY), expected)
    same(segmenter.segment(image, Image.fromarray(7 * ones).convert("RGB"), QUERY, class_id=7), expected)


IMAGE, MASK = SUPPORTS[0]
LEFT = np.arange(60) < 20
RED_AND_GREEN = np.stack([9 * MASK * LEFT, 9 * MASK * ~LEFT, 0 * MASK], 2).astype(np.uint8)
THINGS = [
    (MASK * np.where(LEFT, *values)).astype(np.uint8) for values in ((155, 255), (128, 255), (1, 255), (200, 200))
]
TINY = np.zeros((4000, 4000), bool)
TINY[1, 1] = True


@pytest.mark.parametrize(
    ("supports", "masks", "class_id", "pieces"),
    [
        ([IMAGE, IMAGE], [MASK], None, ["2 supports", "1 masks"]),
        ([IMAGE, IMAGE], [MASK, MASK[:-1]], None, ["support 2 of 2", "60 x 47", "60 x 48"]),
        ([IMAGE, IMAGE], [MASK, 0 * MASK], None, ["support 2 of 2", "shows no target"]),
        (IMAGE, 3 * MASK.astype(np.uint8), None, ["holds 0, 3", "class_id"]),
        (IMAGE, 3 * MASK.astype(np.uint8), 4, ["shows no class 4", "holds 0, 3"]),
        (IMAGE, Image.fromarray(IMAGE), None, ["coloured"]),
        (IMAGE, Image.fromarray(RED_AND_GREEN), None, ["coloured: (0, 0, 0), (0, 9, 0), (9, 0, 0)"]),
        *[(IMAGE, Image.fromarray(ids), None, ["holds 0", str(ids.max()), "--class-id"]) for ids in THINGS],
        ("image.jpg", MASK, None, ["the support", "Pillow"]),
        (Image.fromarray(IMAGE[:, :, 0].astype(np.uint16)), MASK, None, ["I;16", "8 bits"]),
        (np.zeros((4000, 4000, 3), np.uint8), TINY, None, ["the support", "vanishes", "crop"]),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    segmenter: NTRESegmenter, supports: object, masks: object, class_id: int | None, pieces: list[str]
) -> None:
    with pytest.raises(UserError) as refusal:
        segmenter.encode(supports, masks, class_id)
    for piece in pieces:
        assert piece in str(refusal.value)


HOST = """
import multiprocessing, signal, sys, time, warnings
import cv2, scipy.sparse, torch, tqdm  # scipy sets a filter of warnings itself
from PIL import Image

def settings():
    return {
        "signal handlers": [signal.getsignal(n) for n in range(1, 32) if n not in (9, 19)],
        "OpenCV's threads": cv2.getNumThreads(),
        "torch's threads": torch.get_num_threads(),
        "tqdm's monitor": tqdm.tqdm.monitor_interval,
        "warnings": (list(warnings.filters), warnings.showwarning),
        "hooks": (sys.excepthook, sys.stdout, sys.stderr),
        "start method": multiprocessing.get_start_method(allow_none=True),
    }

def load(name, **options):
    return torch.hub.load(sys.argv[1], name, source="local", device="cpu", **options)

child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(8,))
child.start()
before = settings()
load("training_free")
segmenter = load("ntrenet_efficientnet_lite0", checkpoint=sys.argv[2])
after = settings()
print([key for key in before if before[key] != after[key]])
result = segmenter.segment(*(Image.open(name) for name in ("support.png", "mask.png", "query.png")))
print(type(segmenter).__name__, result.mask.shape, result.mask.sum())
print("child is alive:", child.is_alive())
child.join()  # Python waits for it at the end, unless somebody kills it
print("child ended with", child.exitcode)
load("ntrenet_resnet50", checkpoint=sys.argv[2])
"""


def test_hub_changes_nothing_in_the_host_program_and_refuses_another_backbone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "host.py").write_text(HOST)
    for name, pixels in (("support", IMAGE), ("mask", MASK), ("query", QUERY)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    result = process("host.py", ROOT, checkpoint, cwd=tmp_path)
    found = NTRESegmenter.from_checkpoint(checkpoint, device="cpu").segment(IMAGE, MASK, QUERY).mask
    changed, segmented, *child = result.out.splitlines()[-4:]
    assert (changed, segmented) == ("[]", f"NTRESegmenter {found.shape} {found.sum()}")
    assert child == ["child is alive: True", "child ended with 0"]
    assert "UserError: checkpoint" in result.err and "load it with ntrenet_efficientnet_lite0" in result.err


def test_hub_says_that_the_host_program_has_a_module_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "util.py").write_text("")
    (tmp_path / "host.py").write_text("import util, sys, torch\ntorch.hub.load(sys.argv[1], 'x', source='local')")
    result = process("host.py", ROOT, cwd=tmp_path)
    assert "ImportError: the host program has imported a 'util' of its own" in result.err
