"""About 1B parameters, 200M active, for one GPU with 80 GB.

.venv/bin/python experiments/train.py --config=configs/base.py --workdir=/tmp/base
"""

from dsv3_jax import config as c


def get_config() -> c.Config:
    """12 layers of width 1024: 64 experts of 384 + 1 shared, 6 a token; bf16 compute, float32 masters."""
    latent = c.Latent(
        num_heads=16, query_latent_dim=512, latent_dim=256, nope_head_dim=64, rope_head_dim=32, value_head_dim=64
    )
    router = c.GroupedSigmoid(top_k=6, num_groups=8, top_groups=4)
    return c.Config(
        model=c.ModelConfig(
            vocab_size=32_768,
            dim=1024,
            num_layers=12,
            num_dense_layers=1,
            dense_dim=2816,
            attention=c.Attention(projection=latent),
            moe=c.MixtureOfExperts(num_experts=64, expert_dim=384, num_shared_experts=1, router=router),
            compute_dtype="bfloat16",
            remat="dots",
        ),
        data=c.DataConfig(tokenizer=c.BpeTokenizer(32_768), sequence_length=2048),
        train=c.TrainConfig(
            num_steps=20_000,
            batch_size=64,
            microbatches=4,
            optimizer=c.AdamW(learning_rate=1e-3, base_dim=1024),
            schedule=c.WarmupStableDecay(total_steps=20_000, warmup_steps=500, decay_steps=4000),
            log_every=10,
            checkpoint_every=1000,
            eval_every=1000,
            eval_rows=128,
        ),
    )
