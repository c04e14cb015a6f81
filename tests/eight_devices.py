"""Runs a function of a test module in a process of its own with 8 CPU devices; JAX fixes their number when it starts.

The function measures, and returns what can be written as JSON; the tests judge it. Shapes and types of peer_jax are
checked there, too.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def measured(module, function, *arguments):
    """What ``module.function(*arguments)``, of strings, returns there."""
    process = subprocess.run(
        [sys.executable, __file__, module, function, *arguments],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def main():
    import conftest  # noqa: F401, as the tests have it
    import jax

    # optax's bias correction raises a float to the power of an integer count, which strict promotion forbids.
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    assert len(jax.devices()) == 8, jax.devices()
    module, function, *arguments = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(module), function)(*arguments)))


if __name__ == "__main__":
    main()
