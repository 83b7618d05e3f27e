"""SmolLM2-135M with four experts instead of each MLP of its last ten layers, two a token (arXiv:2212.05055).

Every expert begins as a copy of the MLP, so that the first step's loss is SmolLM2's own:

.venv/bin/python experiments/train.py --config=configs/moe/upcycled_smollm2.py --workdir=/tmp/upcycled \\
    --init_from=smollm2
"""

from dsv3_jax import config as c


def get_config() -> c.Config:
    """SmolLM2's shapes and tokenizer; 214M parameters."""
    router = c.GroupedSigmoid(top_k=2, num_groups=1, top_groups=1, route_scale=1.0)
    return c.Config(
        model=c.ModelConfig(
            vocab_size=49_152,
            dim=576,
            num_layers=30,
            num_dense_layers=20,
            dense_dim=1536,
            attention=c.Attention(projection=c.GroupedQuery(9, 3, 64), rope_theta=100_000.0),
            moe=c.MixtureOfExperts(num_experts=4, expert_dim=1536, num_shared_experts=0, router=router),
            tie_embeddings=True,
            norm_epsilon=1e-5,
            unroll=False,
            remat="full",
            context_length=8192,
        ),
        data=c.DataConfig(tokenizer=c.TokenizerFile("smollm2", "<|im_start|>", "<|im_end|>"), sequence_length=512),
        train=c.TrainConfig(
            num_steps=20,
            batch_size=2,
            optimizer=c.AdamW(learning_rate=1e-4, base_dim=576),
            schedule=c.Cosine(total_steps=20, warmup_steps=5),
            checkpoint_every=0,
            eval_every=0,
        ),
    )
