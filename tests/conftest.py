"""Fixtures that all tests share."""

from pathlib import Path

import pytest
import torch

from util.data import synthetic as generator


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a small synthetic data set: 60 training and 40 validation images. Leave its files as they are."""
    root = tmp_path_factory.mktemp("synthetic")
    generator.generate(root, train=60, val=40)
    return root
