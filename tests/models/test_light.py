import subprocess
import sys

import pytest

CHECK = """
import sys
import {module}
assert "transformers.generation.utils" in sys.modules and "sklearn" not in sys.modules and "scipy" not in sys.modules
from sklearn.metrics import roc_curve  # whoever wants it has it
"""


@pytest.mark.parametrize("module", ["rlhf_ray.actors.scorers", "rlhf_ray.actors.policy"])
def test_a_role_does_not_import_scikit_learn_and_may_do_so_later(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", CHECK.format(module=module)], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
