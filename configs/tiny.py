"""The demo: a DeepSeek-V3-shaped model of 2.2M parameters on prose and code, minutes on two cores.

.venv/bin/python experiments/train.py --config=configs/tiny.py --workdir=/tmp/tiny
"""

from dsv3_jax import config as c


def get_config() -> c.Config:
    """Latent attention, one dense layer, then mixture-of-experts layers with one shared expert."""
    latent = c.Latent(
        num_heads=4, query_latent_dim=64, latent_dim=32, nope_head_dim=16, rope_head_dim=16, value_head_dim=32
    )
    router = c.GroupedSigmoid(top_k=2, num_groups=4, top_groups=2)
    return c.Config(
        model=c.ModelConfig(
            vocab_size=4096,
            dim=128,
            num_layers=3,
            num_dense_layers=1,
            dense_dim=384,
            attention=c.Attention(projection=latent),
            moe=c.MixtureOfExperts(num_experts=8, expert_dim=128, num_shared_experts=1, router=router),
        ),
        data=c.DataConfig(tokenizer=c.BpeTokenizer(4096), sequence_length=1024),
        train=c.TrainConfig(
            num_steps=150,
            batch_size=4,
            optimizer=c.AdamW(learning_rate=4e-3, base_dim=128),
            schedule=c.Cosine(total_steps=150, warmup_steps=15),
            checkpoint_every=50,
            eval_every=50,
            eval_rows=16,
        ),
    )
