"""What only XLA's CPU backend needs in order to be fast; every function here computes what a plain one in ``ops`` does.

The ops pick these forms with ``jax.lax.platform_dependent``, so the choice is made when a program is lowered.
"""

import jax

# Whether XLA keeps ``jax.lax.optimization_barrier`` until it has fused operations. Older versions drop the barriers
# earlier, and the forms that are fast because of them would be slower there than the plain ones.
KEEPS_BARRIERS = jax.__version_info__ >= (0, 11, 1)
