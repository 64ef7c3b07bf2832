"""transformers, imported without scikit-learn and SciPy.

It would import both for one function of assisted generation, which nothing here uses: a second of processor time in the
process of every role, and a stage has half a dozen of them.
"""

import sys


def import_transformers() -> None:
    """Import the part that asks for scikit-learn while that seems not to be installed; before any model class."""
    if "sklearn" in sys.modules:
        return
    sys.modules["sklearn"] = None  # type: ignore[assignment] # what Python says of a module that is not there
    try:
        import transformers.generation.candidate_generator  # noqa: F401
    finally:
        del sys.modules["sklearn"]
