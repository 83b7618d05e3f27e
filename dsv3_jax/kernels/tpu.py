"""What our Pallas TPU kernels ask of the chip."""

from typing import Any

import jax
import jax.numpy as jnp

SMALL = ("TPU v2", "TPU v3", "TPU v4")  # 16 MiB of vector memory; the kernels plan with 20 MiB and more


def refusal(dtype: Any) -> str | None:
    """Why the kernels cannot run inputs of this dtype here; None if they can."""
    if jnp.dtype(dtype) == jnp.float16:
        return "TPUs have no float16; use bfloat16"
    kind = jax.local_devices()[0].device_kind if jax.default_backend() == "tpu" else ""
    if kind.startswith(SMALL):
        return f"it is written for TPU v5 and later, which have more vector memory; this is a {kind}"
    return None
