"""What the official packages need before they can be imported today. Their code itself is not touched.

- torchvision: the published wheel may be a CUDA build, whose compiled half cannot be loaded beside a CPU torch. Its
  transforms are Python; only two operators that the import names must exist.
- image-reward, hpsv2: their `__init__` files import datasets, clint, turtle and a BPE file that the wheel lacks. The
  modules that score an image need none of it, so the packages are entered past their `__init__`.
- openai-clip: `from pkg_resources import packaging`, which setuptools no longer has.
"""

import importlib.util
import sys
import types
from pathlib import Path

import packaging
import packaging.version
import torch


def torchvision() -> str:
    """Import torchvision, without its compiled operators if they do not load. Says which of the two it was."""
    try:
        import torchvision

        return f"torchvision {torchvision.__version__}"
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in [module for module in sys.modules if module.startswith("torchvision")]:
            del sys.modules[name]
        _OPERATORS.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _OPERATORS[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        return f"torchvision {torchvision.__version__} (Python half)"


_OPERATORS: list[torch.library.Library] = []  # the operators live as long as their library object


def past_init(*packages: str) -> None:
    """Enter each package without running its `__init__`; parents come before their children."""
    for name in packages:
        parent, _, last = name.rpartition(".")
        if parent:
            places = [str(Path(place) / last) for place in sys.modules[parent].__path__]
        else:
            spec = importlib.util.find_spec(name)
            places = list(spec.submodule_search_locations)
        module = types.ModuleType(name)
        module.__path__ = places
        sys.modules[name] = module


def pkg_resources() -> None:
    module = types.ModuleType("pkg_resources")
    module.packaging = packaging
    sys.modules["pkg_resources"] = module


def install() -> str:
    """All of them; returns the line about torchvision for the table."""
    line = torchvision()
    pkg_resources()
    past_init("ImageReward", "ImageReward.models", "ImageReward.models.BLIP")
    past_init("hpsv2", "hpsv2.src", "hpsv2.src.open_clip")
    return line
