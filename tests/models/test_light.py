import importlib
import subprocess
import sys

import pytest

from rlhf_ray.models.light import absent

ROLE = """
import sys
import {module}
assert "transformers.generation.utils" in sys.modules and "sklearn" not in sys.modules and "scipy" not in sys.modules
from sklearn.metrics import roc_curve  # whoever wants it has it
"""


@pytest.mark.parametrize("module", ["rlhf_ray.actors.scorers", "rlhf_ray.actors.policy"])
def test_a_role_does_not_import_scikit_learn_and_may_do_so_later(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", ROLE.format(module=module)], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_absent_cannot_be_imported_and_what_is_loaded_stays() -> None:
    sys.modules.pop("this", None)
    with absent("this", "json"):
        import json

        with pytest.raises(ImportError):
            importlib.import_module("this")
    assert sys.modules["json"] is json and "this" not in sys.modules
