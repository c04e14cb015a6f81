"""Runs a function of a test module in a process of its own with 8 CPU devices; JAX fixes their number when it starts.

The function measures and returns something that JSON can hold; the tests judge it. Shapes and types of peer_jax are
checked in that process, too.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def measured(module, function, *arguments):
    """What ``module.function(*arguments)`` returns in a process with 8 devices; the arguments are strings."""
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
    import conftest  # noqa: F401, sets up JAX as it does for the tests
    import jax

    # optax's bias correction raises a float to the power of an integer count, which strict promotion forbids.
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    assert len(jax.devices()) == 8, jax.devices()
    module, function, *arguments = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(module), function)(*arguments)))


if __name__ == "__main__":
    main()
