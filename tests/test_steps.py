"""Three steps of SGD from equal weights, ours against the authors' network and PFENet as tests/authors.py has them."""

import pytest
import torch

from model.backbone import Features, build_backbone
from model.prototype_bank import PrototypeBank
from tests import networks
from tests.authors import authors_head, authors_loss, pfenet_loss, sgd
from tests.pfenet import pfenet_head, to_our_names
from util.config import Config, DataConfig, ModelConfig
from util.engine.build import build_optimizer

SCALES = (1.0, 0.5, 0.25)
CHANNELS, SIZE, BATCH, LR = 8, (9, 9), 4, 0.01


def masks() -> torch.Tensor:
    """(B, 65, 65): a rectangle of 1, with a border of 255."""
    out = torch.zeros(BATCH, 65, 65, dtype=torch.long)
    for n, mask in enumerate(out):
        mask[5 + 2 * n : 30 + 3 * n, 10:40] = 255
        mask[7 + 2 * n : 28 + 3 * n, 12:38] = 1
    return out


@pytest.mark.parametrize("name", ["authors", "pfenet"])
def test_three_steps_move_the_weights_as_the_published_training_does(name: str) -> None:
    torch.manual_seed(0)
    authors = name == "authors"
    switches = {} if authors else {"bgem": False, "doem": False}
    sizes = {"channels": CHANNELS, "prototype_channels": CHANNELS, "fem_scales": list(SCALES)}
    backbone = build_backbone("efficientnet_lite0", weights="random")[0]
    network = networks.trained_without_dropout(networks.network(backbone, **switches, **sizes))
    middle = backbone.middle_channels
    if authors:
        head = authors_head(CHANNELS, SCALES, middle)
    else:
        head = pfenet_head(CHANNELS, SCALES, with_prior=True, middle_channels=middle)

    def ours_of(head: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        p_bg = {"bgmm.prototype": head["p_bg"]} if authors else {}
        return p_bg | to_our_names({key: value for key, value in head.items() if key != "p_bg"}, prefix="fem.")

    trained = {key for key, parameter in network.named_parameters() if parameter.requires_grad}
    assert set(ours_of(head)) == trained
    network.load_state_dict(ours_of(head), strict=False)
    start = {key: value.clone() for key, value in ours_of(head).items()}
    head = {key: value.requires_grad_() for key, value in head.items()}

    bank = PrototypeBank(class_ids=range(1, 5), channels=CHANNELS, capacity=2000, keep_empty=True)
    loss = networks.loss(bank if authors else None, weights={"pcl": 1.0})  # 0.01 would hide its gradient
    data = DataConfig(dataset="", root="", train_list="", val_list="", classes=["a", "b", "c", "d"])
    config = Config(data=data, model=ModelConfig(**switches), loss={"pcl": 0.01 * authors})
    optimizer = build_optimizer(config, network)
    for group in optimizer.param_groups:
        group["lr"] = LR * group["factor"]
    velocity: dict[str, torch.Tensor] = {}
    stored: dict[int, list[torch.Tensor]] = {}
    class_ids, truth, shown = torch.tensor([1, 2, 1, 4]), masks(), masks().flip(0, 2)
    for _ in range(3):
        query, support = (Features(torch.randn(BATCH, middle, *SIZE), torch.rand(BATCH, 16, *SIZE)) for _ in range(2))
        output = network.head(query, Features(*(x.unsqueeze(1) for x in support)), shown.unsqueeze(1))
        losses = loss(output, truth, shown.unsqueeze(1), class_ids)
        losses["total"].backward()
        optimizer.step()
        optimizer.zero_grad()

        given = (query.middle, support.middle), (truth, shown), output.prior
        if authors:
            expected = authors_loss(head, *given, class_ids, stored, SCALES, 1.0)
        else:
            expected = pfenet_loss(head, *given, SCALES)
        assert losses["total"].item() == pytest.approx(expected.item(), rel=1e-4)
        sgd(head, velocity, expected, LR, config.train.momentum, config.train.weight_decay)

    moved = dict(network.named_parameters())
    for key, value in ours_of(head).items():
        step = (value - start[key]).norm()
        assert step > 0, key
        assert (moved[key] - value).norm() < 2e-3 * step + 1e-6, key
