"""python -m benchmarks.layers: the convolutions of real networks, as JSON files that are generated from the models.

They lie in benchmarks/layers/; needs torchvision and timm.
"""

import collections
import functools
import importlib
import json
import math
import pathlib
from dataclasses import dataclass
from typing import Any

import torch

FOLDER = pathlib.Path(__file__).with_name("layers")
# Where each is, and its options. ConvNeXt's linear layers as the 1x1 convolutions that they are.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet50": ("torchvision.models", {}),
    "convnext_tiny": ("timm.models", {"conv_mlp": True}),
    "eca_nfnet_l0": ("timm.models", {}),
}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """The convolutions of a network, in module order."""

    name: str
    layers: tuple[tuple[str, Shape], ...]

    @functools.cached_property
    def shapes(self) -> dict[Shape, int]:
        """Each distinct weight shape, in order of appearance, and how many layers have it."""
        return dict(collections.Counter(shape for _, shape in self.layers))

    @property
    def weights(self) -> int:
        return sum(math.prod(shape) for _, shape in self.layers)

    @property
    def filters(self) -> int:
        return sum(shape[0] for _, shape in self.layers)

    def to_json(self) -> dict[str, Any]:
        return {
            "network": f"{NETWORKS[self.name][0]}.{self.name}",
            "weights": self.weights,
            "filters": self.filters,
            "layers": [{"name": name, "shape": list(shape)} for name, shape in self.layers],
            "shapes": [{"shape": list(shape), "count": count} for shape, count in self.shapes.items()],
        }


def from_model(name: str) -> Network:
    """Every Conv2d of the network."""
    module, options = NETWORKS[name]
    with torch.device("meta"):
        model = getattr(importlib.import_module(module), name)(**options)
    convolutions = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    return Network(name, tuple((n, tuple(m.weight.shape)) for n, m in convolutions))


def load(name: str) -> Network:
    """The committed network."""
    layers = json.loads((FOLDER / f"{name}.json").read_text())["layers"]
    return Network(name, tuple((layer["name"], tuple(layer["shape"])) for layer in layers))


def to_text(network: Network) -> str:
    """JSON, one layer per line."""
    fields = []
    for key, value in network.to_json().items():
        rows = ",\n".join(f"    {json.dumps(row)}" for row in value) if isinstance(value, list) else None
        fields.append(f"  {json.dumps(key)}: " + (json.dumps(value) if rows is None else f"[\n{rows}\n  ]"))
    return "{\n" + ",\n".join(fields) + "\n}\n"


if __name__ == "__main__":
    for each in NETWORKS:
        (FOLDER / f"{each}.json").write_text(to_text(from_model(each)))
        print(FOLDER / f"{each}.json")
