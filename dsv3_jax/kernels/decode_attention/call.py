"""What every implementation of attention to a cache takes."""

from typing import NamedTuple

import jax


class Call(NamedTuple):
    """Attention of new tokens to a cache, as `api.decode_attention` takes it. bias_BTS: −inf where a slot is
    hidden."""

    q_BTHN: jax.Array
    k_BSGN: jax.Array
    v_BSGM: jax.Array | int
    bias_BTS: jax.Array
    scale: float
    softcap: float | None = None

    @property
    def arrays(self) -> list[jax.Array]:
        """Of the cache: keys and values, or keys alone whose first elements are the values (latent attention)."""
        return [self.k_BSGN] if isinstance(self.v_BSGM, int) else [self.k_BSGN, self.v_BSGM]

    @property
    def value_width(self) -> int:
        """M."""
        return self.v_BSGM if isinstance(self.v_BSGM, int) else self.v_BSGM.shape[-1]
