"""Vision transformer (ViT) that classifies images, with the blocks and feed-forward layers of the ``Transformer``.

b  batch     H, W  height and width     c  channels     p  patch_size     s  patches, (H / p) * (W / p)
d  d_model     C  classes
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Int, Shaped

from peer_jax.errors import InputError
from peer_jax.fields import Placed
from peer_jax.layers.checks import check_function, check_sizes, initial
from peer_jax.layers.interface import Aux, Routing
from peer_jax.layers.linear import Linear
from peer_jax.models.model import FeedForwardFactory, Model

Images = Shaped[Array, "b H W c"]


def patches_of(images: Images, patch_size: int) -> Shaped[Array, "b s n"]:
    """The patches of images from left to right and from top to bottom, each with its n = p * p * c values in a row."""
    b, H, W, c = images.shape
    p = patch_size
    rows = images.reshape(b, H // p, p, W // p, p, c)
    return rows.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * c)


class PatchEmbed(nnx.Module):
    """A linear embedding of patches plus a learned vector for each position."""

    def __init__(
        self,
        num_patches: int,
        patch_width: int,
        d_model: int,
        *,
        position_init: Initializer,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ) -> None:
        kernel_init = nnx.initializers.lecun_normal()
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.linear = Linear(patch_width, d_model, (None, "embed"), kernel_init=kernel_init, **types)
        positions = initial(position_init, rngs.params(), (num_patches, d_model), param_dtype)
        self.positions = nnx.Param(positions, axes=(None, "embed"))

    def __call__(self, patches: Float[Array, "b s n"]) -> Float[Array, "b s d"]:
        x = self.linear(patches)
        return x + self.positions[...].astype(x.dtype)[None]


class ViT(Model):
    """Vision transformer of Dosovitskiy et al. 2021 (arXiv:2010.11929); the class comes from the mean over patches.

    Its blocks are those of the ``Transformer``, without causality and rotary positions. A token is a patch, and one
    class is predicted per image.

    Args:
        image_shape: H, W and c.
        patch_size: p, which divides H and W.
        num_classes: C.
        d_model: width of the residual stream.
        num_blocks: blocks of attention and a feed-forward layer.
        num_heads: attention heads.
        ffw, sparse_ffw, sparse_blocks, share_tables, remat, attention_implementation, dtype, param_dtype: as of the
            ``Transformer``.
        position_init: initialiser of the learned positions.
        rngs: random numbers for the parameters.

    Raises:
        InputError: if sizes or options don't fit, the parameters don't fit into memory, or a layer that routes doesn't
            say how many experts it has.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        patch_size: int,
        num_classes: int,
        d_model: int,
        num_blocks: int,
        num_heads: int,
        *,
        ffw: FeedForwardFactory,
        sparse_ffw: FeedForwardFactory | None = None,
        sparse_blocks: str | Sequence[int] = "middle",
        share_tables: bool = False,
        remat: Placed[bool] = False,
        attention_implementation: Placed[str | None] = None,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        position_init: Initializer = nnx.initializers.normal(0.02),
        rngs: nnx.Rngs,
    ) -> None:
        if len(image_shape) != 3:
            raise InputError(f"image_shape={image_shape!r} must be height, width and channels, such as (32, 32, 3)")
        height, width, channels = image_shape
        check_sizes(height=height, width=width, channels=channels, patch_size=patch_size, num_classes=num_classes)
        check_sizes(d_model=d_model)
        if height % patch_size or width % patch_size:
            raise InputError(
                f"patch_size={patch_size} does not divide images of {height} x {width}: choose a divisor of both"
            )
        check_function(position_init=position_init)
        self.image_shape, self.patch_size, self.num_classes = tuple(image_shape), patch_size, num_classes
        self.num_patches = (height // patch_size) * (width // patch_size)
        self.patch_width = patch_size * patch_size * channels

        def embed(**types) -> PatchEmbed:
            return PatchEmbed(self.num_patches, self.patch_width, d_model, position_init=position_init, **types)

        def head(**types) -> Linear:
            kernel_init = nnx.initializers.lecun_normal()
            return Linear(d_model, num_classes, ("embed", "vocab"), kernel_init=kernel_init, **types)

        super().__init__(
            d_model,
            num_blocks,
            num_heads,
            embed=embed,
            head=head,
            sizes={"patch_size": patch_size, "num_classes": num_classes},
            outer_params=d_model * (self.patch_width + self.num_patches + num_classes),
            ffw=ffw,
            sparse_ffw=sparse_ffw,
            sparse_blocks=sparse_blocks,
            share_tables=share_tables,
            remat=remat,
            attention={"causal": False, "rope_theta": None, "implementation": attention_implementation},
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    @property
    def is_causal(self) -> None:
        """None: no token is predicted from earlier ones, so that no loss is flattered by seeing later ones."""
        return None

    def __call__(self, images: Images, segment_ids: Int[Array, " b"] | None = None) -> tuple[Float[Array, "b C"], Aux]:
        """Logits of the classes of each image, and the auxiliary losses summed over blocks.

        Images are integers from 0 to 255, or floating-point numbers that are taken as they are. ``segment_ids`` are 0
        for images that fill a batch up and count nowhere. Metrics are named ``block_<i>/<metric>``.
        """
        x, ids = self._embed(images, segment_ids)
        x, aux = self._run_blocks(x, _positions(x), ids)
        return self.head(jnp.mean(self.final_norm(x), axis=1)).astype(jnp.float32), aux

    def cross_entropy(
        self, inputs: Images, targets: Int[Array, " b"], segment_ids: Int[Array, " b"] | None = None
    ) -> tuple[Float[Array, ""], Aux]:
        """The negative log-likelihood of the labels in nats, summed over the images that count."""
        logits, aux = self(inputs, segment_ids)
        return _summed(_nll(logits, targets), segment_ids), aux

    def scores(
        self, inputs: Images, targets: Int[Array, " b"], segment_ids: Int[Array, " b"] | None = None
    ) -> dict[str, Float[Array, ""]]:
        """The summed loss, and the number of images whose label has the largest logit, as ``accuracy``."""
        logits, _ = self(inputs, segment_ids)
        correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
        return {"loss": _summed(_nll(logits, targets), segment_ids), "accuracy": _summed(correct, segment_ids)}

    def route(self, inputs: Images, segment_ids: Int[Array, " b"] | None = None) -> dict[int, Routing]:
        x, ids = self._embed(inputs, segment_ids)
        return self._route_blocks(x, _positions(x), ids)

    def _embed(
        self, images: Images, segment_ids: Int[Array, " b"] | None
    ) -> tuple[Float[Array, "b s d"], Int[Array, "b s"] | None]:
        """The embedded patches of images, and the segment id of each patch, which is that of its image."""
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            wanted = ", ".join(map(str, self.image_shape))
            raise InputError(f"images must have the shape [batch, {wanted}], not {list(images.shape)}")
        if jnp.issubdtype(images.dtype, jnp.integer):
            images = images.astype(jnp.float32) / 127.5 - 1.0
        x = self.embed(patches_of(images, self.patch_size))
        if segment_ids is None:
            return x, None
        return x, jnp.broadcast_to(segment_ids[:, None], x.shape[:2])

    def num_tokens(self, inputs: Images) -> int:
        return inputs.shape[0] * self.num_patches

    def logits_at_once(self, tokens: int, seq_len: int) -> int:
        return math.ceil(tokens / seq_len) * self.num_classes

    def flops_by_part(self, seq_len: int) -> dict[str, float]:
        """Forward FLOPs per token, which is a patch, by part; the ``logits`` of an image are shared by its patches."""
        parts = self._flops_of_blocks(seq_len)
        outer = {"logits": 2.0 * self.d_model * self.num_classes / seq_len}
        return {"patches": 2.0 * self.patch_width * self.d_model, "attention": parts["attention"]} | outer | parts


def _positions(x: Float[Array, "b s d"]) -> Int[Array, "b s"]:
    """Places of patches, which only rotary positions would need."""
    return jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])


def _nll(logits: Float[Array, "b C"], labels: Int[Array, " b"]) -> Float[Array, " b"]:
    """The negative log-likelihood of each label; infinite for a label that is no class."""
    index = jnp.where(labels < 0, logits.shape[1], labels)[:, None]  # a negative index would count from the end
    chosen = jnp.take_along_axis(logits, index, axis=1, mode="fill", fill_value=-jnp.inf)
    return jax.nn.logsumexp(logits, axis=1) - chosen[:, 0]


def _summed(values: Float[Array, " b"], segment_ids: Int[Array, " b"] | None) -> Float[Array, ""]:
    """The sum over the images that count."""
    return jnp.sum(values if segment_ids is None else jnp.where(segment_ids > 0, values, 0.0))
