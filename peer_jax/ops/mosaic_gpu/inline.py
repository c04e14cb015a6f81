"""What the kernels of JAX 0.11 need in other forms than their callers have: activations, and how to simulate them."""

from collections.abc import Callable
from typing import Any

import jax


def without_rules(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same function without its custom derivatives (``jax.nn.relu`` has one): JAX 0.11 can't compile them."""
    from jax.extend.core import Literal

    def evaluate(jaxpr, consts, *arguments):
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

        def read(variable):
            return variable.val if isinstance(variable, Literal) else values[variable]

        for equation in jaxpr.eqns:
            inputs = [read(variable) for variable in equation.invars]
            inner = equation.params.get({"custom_jvp_call": "call_jaxpr", "jit": "jaxpr"}.get(equation.primitive.name))
            if inner is not None:
                out = evaluate(inner.jaxpr, inner.consts, *inputs)
            else:
                out = equation.primitive.bind(*inputs, **equation.params)
                out = out if equation.primitive.multiple_results else [out]
            values.update(zip(equation.outvars, out, strict=True))
        return [read(variable) for variable in jaxpr.outvars]

    def call(x):
        closed = jax.make_jaxpr(function)(x)
        (y,) = evaluate(closed.jaxpr, closed.consts, x)
        return y

    return call


def interpreter(interpret: Any) -> Any:
    """What ``plgpu.kernel`` takes as ``interpret``: False, or how to simulate a kernel on CPU, by default for True."""
    if interpret is not True:
        return interpret
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams()
