"""Networks in the forms in which people write them: modules whose ``forward`` calls their layers, for 3 x 12 x 12 images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attributes(nn.Module):
    """Every layer is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu, self.pool = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc1, self.drop, self.fc2 = nn.Linear(32, 16), nn.Dropout(0.0), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        return self.fc2(self.drop(self.relu(self.fc1(x))))


class Functional(Attributes):
    """Functions for everything without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), kernel_size=(2, 2))
        x = F.relu(self.fc1(x.view(x.size(0), -1)))
        x = F.dropout(x, p=0.0, training=self.training)
        return self.fc2(x)


class TensorMethods(Attributes):
    """ReLUs as tensor methods and functions of torch, in place where nothing else reads the tensor."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = self.pool(self.conv2(x).relu_())
        return self.fc2(self.fc1(x.reshape(len(x), 32)).relu())


class InPlace(Attributes):
    """ReLUs in place, as statements without a result."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        F.relu(x, inplace=True)
        x = self.conv2(self.pool(x))
        torch.relu_(x)
        x = self.fc1(self.pool(x).flatten(1))
        x.relu_()
        return self.fc2(x)


class ReadTwice(Attributes):
    """The input of a ReLU is also read by a second path or through a view."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        z = self.pool(self.relu(y)) + self.pool(y.abs())
        y = self.conv2(z)
        flat = y.view(len(y), -1)
        y.relu_()
        return self.fc2(F.relu(self.fc1(flat[:, :32])) + flat[:, :16])


class Lists(nn.Module):
    """Layers in a list, a dict, and a plain Python list of containers."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)])
        self.heads = nn.ModuleDict({"a": nn.Linear(32, 4), "b": nn.Linear(32, 2)})
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.walked = [self.block, self.block]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for conv in self.convs:
            x = F.relu(conv(x))
        for part in self.walked:
            x = part(x)
        x = F.max_pool2d(x, 4).flatten(1)
        return {name: head(x) for name, head in self.heads.items()}


class Branches(Attributes):
    """Arguments that change what ``forward`` does, helper methods, several outputs."""

    def features(self, x: Tensor, *, pooled: bool) -> Tensor:
        x = F.relu(self.conv1(x))
        return self.pool(x) if pooled else F.avg_pool2d(x, 2)

    def forward(self, x: Tensor, twice: bool = False, pooled: bool = True) -> tuple[Tensor, Tensor]:
        x = self.features(x, pooled=pooled)
        for _ in range(2 if twice else 1):
            x = F.relu(self.conv2(x))
        y = self.fc1(F.max_pool2d(x, 2).flatten(1))
        return self.fc2(F.relu(y)), x


class Looking(Attributes):
    """A branch that depends on the input's values: the compiler's graph breaks there."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        if x.mean() > 0.05:
            x = self.relu(self.conv2(x))
        return self.fc2(self.relu(self.fc1(self.pool(x).flatten(1))))


class SideEffects(Attributes):
    """Counts its calls, keeps activations and shapes, fills a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.shapes: list[tuple[int, ...]] = []
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += len(x)
        x = F.relu(self.conv1(x))
        self.kept = x.detach()
        self.shapes.append(tuple(x.shape))
        x = self.pool(self.relu(self.conv2(self.pool(x))))
        return self.fc2(self.relu(self.fc1(x.flatten(1))))


class OwnParameters(nn.Module):
    """Parameters of its own, passed to functions; one weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Parameter(0.3 * torch.randn(6, 3, 3, 3))
        self.scale = nn.Parameter(torch.ones(6, 1, 1, 1))
        self.matrix, self.bias = nn.Parameter(0.1 * torch.randn(4, 150)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(F.conv2d(x, self.filters * self.scale)), 2)
        return F.linear(x.flatten(1), self.matrix, bias=self.bias)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.relu = nn.Conv2d(channels, channels, 1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.relu(self.norm(self.conv1(x))))
        y += x
        return self.relu(y)


class Residual(nn.Module):
    """Residual blocks in a container, beside layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.blocks(F.relu(self.stem(x)))).flatten(1))


class Containers(nn.Module):
    """The form of half of all AlexNets: two containers with a view between them."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2), nn.Conv2d(8, 8, 3), nn.ReLU()
        )
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(32, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.view(x.size(0), 8 * 2 * 2))


class Regions(Attributes):
    """Regions without gradients, and in another precision."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.conv1(x)
        x = self.pool(self.relu(x))
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            y = self.conv2(x)
        y = self.pool(self.relu(y)).float().flatten(1)
        return self.fc2(self.relu(self.fc1(y)))


class Shared(Attributes):
    """One layer used twice, and a layer's weight passed to a function."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(self.relu(self.conv2(x)))))
        x = self.relu(self.fc1(x.flatten(1)))
        return self.fc2(self.relu(F.linear(x, self.fc1.weight[:, :16])))


class Subclassed(nn.Sequential):
    """A Sequential with its own ``forward``, and a layer of a subclass."""

    class Activated(nn.Conv2d):
        """A convolution with its activation."""

        def forward(self, input: Tensor) -> Tensor:
            return F.relu(super().forward(input))

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*(layers or (self.Activated(3, 8, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 4))))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x + 1


FORMS: dict[str, type[nn.Module]] = {
    form.__name__: form
    for form in (
        *(Attributes, Functional, TensorMethods, InPlace, ReadTwice, Lists, Branches, Looking, SideEffects),
        *(OwnParameters, Residual, Containers, Regions, Shared, Subclassed),
    )
}


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of a network's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in (output.values() if isinstance(output, dict) else output) for tensor in tensors_of(part)]
