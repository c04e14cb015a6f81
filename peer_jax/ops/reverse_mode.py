"""The refusal of forward-mode derivatives (``jax.jvp``, ``jax.jacfwd``) by ops that have a backward pass of their own.

JAX refuses them too, but names no op. Where it does so while it traces the op, as in ``jax.vmap``, ``explained`` sees
the refusal. Within ``jax.jit`` JAX refuses later. Arguments of an op therefore pass through ``reverse_mode``, which
changes no value. Its tangents pass through a linear primitive, which reverse mode transposes away, so that only forward
mode ever runs or compiles it. The derivative of a function that is already compiled, under ``jax.vmap``, as in
``jax.jacfwd(jax.jit(f))``, is still refused in JAX's words.
"""

import contextlib
import functools
from collections.abc import Iterator

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Shaped

from peer_jax.errors import InputError


@contextlib.contextmanager
def explained(op: str) -> Iterator[None]:
    """Raises an InputError that names ``op`` in place of JAX's refusal."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        _refuse(op=op)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def reverse_mode(op: str, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """``x``; forward-mode derivatives through it raise an InputError that names ``op``."""
    return x


@reverse_mode.defjvp
def _reverse_mode_jvp(op, primals, tangents):
    return primals[0], _tangent.bind(tangents[0], op=op)


def _refuse(*_, op: str, **__):
    raise InputError(
        f"{op}: only implementation='reference' has forward-mode derivatives (jax.jvp, jax.jacfwd): pass it to the "
        "layer or the op"
    ) from None


_tangent = Primitive("reverse_mode_tangent")
_tangent.def_impl(_refuse)
_tangent.def_abstract_eval(lambda tangent, op: tangent)
mlir.register_lowering(_tangent, _refuse)
ad.deflinear2(_tangent, lambda cotangent, _, op: [cotangent])
batching.defvectorized(_tangent)
