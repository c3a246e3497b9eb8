"""AlexNet, and the plain ``nn.Sequential`` networks that it is compared with."""

from __future__ import annotations

from torch import nn

from .fused import FusedSequential

#: Side of the square input image, by model name.
IMAGE_SIZE = {"alexnet": 224, "lenet": 28, "torchvision": 224}


def _alexnet_layers(num_classes: int, in_channels: int, dropout: float) -> list[nn.Module]:
    """The 21 layers of the network: d2l's single-column form of Krizhevsky, Sutskever and Hinton (2012)."""
    return [
        nn.Conv2d(in_channels, 96, kernel_size=11, stride=4, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(96, 256, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(256, 384, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 384, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Flatten(),
        nn.Linear(6400, 4096),
        nn.ReLU(),
        nn.Dropout(p=dropout),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Dropout(p=dropout),
        nn.Linear(4096, num_classes),
    ]


class AlexNet(FusedSequential):
    """AlexNet on fused Triton kernels, for images of 224 x 224.

    Same layers, parameters (46,764,746 by default) and ``state_dict`` keys as :func:`reference_alexnet`.

    Args:
        num_classes: size of the output.
        in_channels: channels of the image, 1 or 3.
        dropout: probability of dropping an element after each of the two hidden linear layers, in [0, 1].

    Shape:
        Input (N, in_channels, 224, 224), float32, float16 or bfloat16 like the parameters; output (N, num_classes).
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, dropout: float = 0.5) -> None:
        super().__init__(*_alexnet_layers(num_classes, in_channels, dropout))


def reference_alexnet(num_classes: int = 10, in_channels: int = 1, dropout: float = 0.5) -> nn.Sequential:
    """The same network as :class:`AlexNet` as a plain ``nn.Sequential``, on PyTorch's own operations."""
    return nn.Sequential(*_alexnet_layers(num_classes, in_channels, dropout))


def reference_lenet(num_classes: int = 10, in_channels: int = 1) -> nn.Sequential:
    """LeNet-5 as in d2l, the baseline for AlexNet: maps (N, in_channels, 28, 28) to (N, num_classes)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, kernel_size=5, padding=2),
        nn.Sigmoid(),
        nn.AvgPool2d(kernel_size=2, stride=2),
        nn.Conv2d(6, 16, kernel_size=5),
        nn.Sigmoid(),
        nn.AvgPool2d(kernel_size=2, stride=2),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120),
        nn.Sigmoid(),
        nn.Linear(120, 84),
        nn.Sigmoid(),
        nn.Linear(84, num_classes),
    )


def init_xavier_uniform(layer: nn.Module) -> None:
    """d2l's initialisation, for ``net.apply``: Xavier-uniform weights of Conv2d and Linear. Biases are left as they are."""
    if type(layer) in (nn.Linear, nn.Conv2d):
        nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
