"""Which drafts are kept, so that what comes out is what the model alone gives (Leviathan et al. 2023, arXiv:2211.17192;
Chen et al. 2023, arXiv:2302.01318)."""

import jax
import jax.numpy as jnp

from dsv3_jax.inference.sampling import first_best

DRAFT, ACCEPT, REPLACE = range(3)  # what a random number of a token is for


def acceptance(p: jax.Array, q: jax.Array) -> jax.Array:
    """min(1, p / q): how often a draft is accepted that the model gives the probability p, and the draft q > 0."""
    return jnp.minimum(1.0, p / jnp.where(q > 0, q, 1.0))


def replacement(p_BV: jax.Array, q_BV: jax.Array) -> jax.Array:
    """max(p − q, 0), normalised: the probabilities of the token that replaces a rejected draft. Where rounding leaves
    nothing of p − q, p."""
    rest_BV = jnp.maximum(p_BV - q_BV, 0.0)
    total_B1 = jnp.sum(rest_BV, axis=-1, keepdims=True)
    return jnp.where(total_B1 > 0, rest_BV / jnp.where(total_B1 > 0, total_B1, 1.0), p_BV)


def _accepted(agrees_BN: jax.Array, proposed_B: jax.Array) -> jax.Array:
    """How many of the first `proposed_B` drafts come before the first that is rejected, int32 [B]."""
    agrees_BN &= jnp.arange(agrees_BN.shape[1]) < proposed_B[:, None]
    return jnp.sum(jnp.cumprod(agrees_BN.astype(jnp.int32), axis=1), axis=1)


def accept_greedy(logits_BMV: jax.Array, drafts_BN: jax.Array, proposed_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The number of accepted drafts of each row, and the token after them: what the model alone would choose."""
    best_BM = jax.vmap(first_best, 1, 1)(logits_BMV)
    accepted_B = _accepted(drafts_BN == best_BM[:, :-1], proposed_B)
    return accepted_B, jnp.take_along_axis(best_BM, accepted_B[:, None], axis=1)[:, 0]


def accept_sampled(
    p_BMV: jax.Array, q_BNV: jax.Array, drafts_BN: jax.Array, proposed_B: jax.Array, keys_BM: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Rejection sampling: the accepted drafts and the token after them are distributed as the model's own samples.

    Args:
      p_BMV: the model's probabilities of the token at each of M = N + 1 places. q_BNV: those that the drafts were drawn
        from, independently of `keys_BM`' uses here.
      proposed_B: drafts that count, 0 to N; later ones are as if they had not been made.
      keys_BM: a key for each place.

    Returns:
      accepted_B, how many drafts are accepted, and next_B, the token after them; int32.
    """
    B, N = drafts_BN.shape

    def of_drafts(x_BNV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BNV, drafts_BN[..., None], axis=-1)[..., 0]

    u_BN = jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, ACCEPT))))(keys_BM[:, :N])
    accepted_B = _accepted(u_BN < acceptance(of_drafts(p_BMV[:, :N]), of_drafts(q_BNV)), proposed_B)
    rows_B = jnp.arange(B)
    # Where nothing was proposed, there is nothing to take from p.
    q_BV = jnp.where((accepted_B < proposed_B)[:, None], q_BNV[rows_B, jnp.minimum(accepted_B, N - 1)], 0.0)
    next_BV = jnp.log(replacement(p_BMV[rows_B, accepted_B], q_BV))
    keys_B = jax.vmap(lambda key: jax.random.fold_in(key, REPLACE))(keys_BM[rows_B, accepted_B])
    return accepted_B, jax.vmap(jax.random.categorical)(keys_B, next_BV).astype(jnp.int32)
