"""What only TPUs need in order to be fast; every function here computes what a plain one in ``ops`` does.

The ops consider these forms where ``peer_jax.sharding.target`` is a TPU, so that other devices never trace them. For
kernels, ``jax.lax.platform_dependent`` decides as well, since they can't be lowered for anything else.
"""

import jax

# What the compiler does only if it is asked to: sorts run on SparseCores, where a TPU has them. The oldest
# libtpu that was tried is that of JAX 0.10.2.
COMPILER_OPTIONS = (
    {"xla_tpu_enable_offloading_sort_to_sparsecore": True} if jax.__version_info__ >= (0, 10, 2) else None
)
