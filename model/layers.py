"""The stacks of layers that several boxes of the paper's figure are built from."""

from torch import nn

from model.parallel import Dropout2d


def conv_relu(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Stack a convolution without bias that keeps the size, and a ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.ReLU(inplace=True))


def refinement(channels: int) -> nn.Sequential:
    """Stack two 3x3 convolutions, each with a ReLU; their result is added to their input."""
    return nn.Sequential(*conv_relu(channels, channels, 3), *conv_relu(channels, channels, 3))


def classifier(channels: int) -> nn.Sequential:
    """Stack a 3x3 convolution, Dropout2d(0.1), a ReLU and a 1x1 convolution to one logit.

    Dropout comes before the ReLU, which is the same and keeps one map less for the backward pass.
    """
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, Dropout2d(0.1), nn.ReLU(inplace=True), nn.Conv2d(channels, 1, 1))
