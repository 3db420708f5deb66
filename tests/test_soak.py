"""A long evaluation: its memory does not grow."""

import os
from pathlib import Path

import pytest
from torch import Tensor

from tests.scenes import SMALL
from util.config import load_config
from util.engine.build import build_eval_sampler, build_index, build_model, select_hardware
from util.engine.evaluation import NetworkMethod, confusion_of, evaluate

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("cache_gib", [1, 0.001], ids=["everything fits", "entries are evicted"])
def test_the_memory_of_a_long_evaluation_does_not_grow(synthetic: Path, cache_gib: float) -> None:
    lists = [f"data.{split}_list={synthetic}/lists/{split}.txt" for split in ("train", "val")]
    config = load_config(
        ROOT / "configs/synthetic/efficientnet_lite0_fold0_1shot.yaml",
        [f"data.root={synthetic}", *lists, *SMALL, "data.min_area=64", "workers=0", f"eval.cache_gib={cache_gib}"],
    )
    hardware, index = select_hardware(config), build_index(config, "val")
    sampler = build_eval_sampler(config, index, seed=0)
    resident: list[int] = []

    def measure(score: Tensor, ids: Tensor, value: int) -> Tensor:
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        return confusion_of(score, ids, value)

    method = NetworkMethod(build_model(config)[0], config, hardware)
    evaluate(method, index, [sampler(number) for number in range(1000)], config=config, measure=measure)
    quarter = len(resident) // 4
    print(f"\nMiB by quarter: {[max(resident[n * quarter :][:quarter]) >> 20 for n in range(4)]}")
    assert max(resident[2 * quarter :]) <= max(resident[: 2 * quarter]) + 16 * 2**20
