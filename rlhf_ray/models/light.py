"""Imports without what nothing here uses.

transformers imports scikit-learn for one function of assisted generation and SciPy for losses of object detection, vLLM
SciPy for sounds: seconds of processor time in each role's process, and a stage has half a dozen of them. Both libraries
do without what is not installed.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def absent(*packages: str) -> Iterator[None]:
    """These seem not to be installed while the body imports others; those that are loaded already stay."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type] # None: Python says it is not there
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def import_transformers() -> None:
    """The part that asks first, for both, and notes the answer; to be imported before any `Auto` class."""
    with absent("sklearn", "scipy"):
        import transformers.generation.candidate_generator  # noqa: F401
