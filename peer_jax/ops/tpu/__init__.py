"""What only TPUs need in order to be fast; every function here computes what a plain one in ``ops`` does.

The ops pick these forms with ``jax.lax.platform_dependent``, so the choice is made when a program is lowered.
"""

# What the compiler does only if it is asked to: sorts run on SparseCores, where a TPU has them.
COMPILER_OPTIONS = {"xla_tpu_enable_offloading_sort_to_sparsecore": True}
