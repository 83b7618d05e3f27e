"""Shape letters used in names, and the logical axes that `sharding.py` maps to mesh axes.

Letters (`x_BTD` has shape [batch, query positions, model width]):

    B batch             T query position     S key position       D model width
    H query heads       G key/value heads    N query/key head width    M value head width
    R RoPE width        C key/value latent   Q query latent
    F feed-forward      E experts            K experts per token  V vocabulary
    L layers            P tokens (B·T flattened), or rows of a grouped matmul
"""

BATCH = "batch"
LENGTH = "length"
EMBED = "embed"  # model width of an activation
FSDP_EMBED = "fsdp_embed"  # model width of a parameter
HEADS = "heads"
KV_HEADS = "kv_heads"
HEAD_DIM = "head_dim"
LATENT = "latent"
MLP = "mlp"
EXPERTS = "experts"
ROUTED = "routed"  # experts as the router sees them: a column each, on every device
EXPERT_MLP = "expert_mlp"
VOCAB = "vocab"
LAYERS = "layers"
NORM = "norm"

LOGICAL_AXES = frozenset(
    {BATCH, LENGTH, EMBED, FSDP_EMBED, HEADS, KV_HEADS, HEAD_DIM, LATENT}
    | {MLP, EXPERTS, ROUTED, EXPERT_MLP, VOCAB, LAYERS, NORM}
)
