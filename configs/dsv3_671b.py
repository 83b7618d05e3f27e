"""The published DeepSeek-V3 (arXiv:2412.19437, section 4.2; `config.json` of the released checkpoint): 671B parameters,
37B active, and a multi-token-prediction module of 12B that shares their embedding and head. Checked by `eval_shape`; it
needs a cluster to run.

    .venv/bin/python -c "from dsv3_jax.config import load; from dsv3_jax.planning.flops import count_parameters; \
print(count_parameters(load('configs/dsv3_671b.py').model))"
"""

from dsv3_jax import config as c


def get_config() -> c.Config:
    """61 layers of which 3 dense; 256 experts, 8 a token, in 8 groups of which 4."""
    latent = c.Latent(
        num_heads=128,
        query_latent_dim=1536,
        latent_dim=512,
        nope_head_dim=128,
        rope_head_dim=64,
        value_head_dim=128,
    )
    router = c.GroupedSigmoid(
        top_k=8, num_groups=8, top_groups=4, route_scale=2.5, bias_update_rate=1e-3, balance_weight=1e-4
    )
    return c.Config(
        model=c.ModelConfig(
            vocab_size=129_280,
            dim=7168,
            num_layers=61,
            num_dense_layers=3,
            dense_dim=18_432,
            attention=c.Attention(projection=latent),
            moe=c.MixtureOfExperts(num_experts=256, expert_dim=2048, num_shared_experts=1, router=router),
            # 0.3 for the first 10T tokens, at 15,360 x 4096 tokens a step; then 0.1.
            mtp=c.MultiToken(depth=1, weight=0.3, late_weight=0.1, late_step=158_946),
            init_std=0.006,
            compute_dtype="bfloat16",
            remat="full",
        ),
        data=c.DataConfig(tokenizer=c.DeepSeekTokenizer(), sequence_length=4096),
        train=c.TrainConfig(
            num_steps=500_000,
            batch_size=15_360,
            microbatches=15,
            optimizer=c.AdamW(
                learning_rate=2.2e-4,
                base_dim=7168,
                first_moment_dtype="bfloat16",
                second_moment_dtype="bfloat16",
            ),
            schedule=c.Cosine(total_steps=500_000, warmup_steps=2000),
        ),
        mesh=c.MeshConfig(data=1, fsdp=128, expert=8),
    )
