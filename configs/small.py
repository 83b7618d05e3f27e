"""10.5M parameters: the model that `benchmark.py --suite=train_step` times against Hugging Face transformers.

.venv/bin/python experiments/train.py --config=configs/small.py --workdir=/tmp/small
"""

from dsv3_jax import config as c


def get_config() -> c.Config:
    """The defaults of `ModelConfig`: width 256, 4 layers of which 1 dense, 16 experts of 128 + 1 shared, top-4."""
    return c.Config(
        data=c.DataConfig(sequence_length=256),
        train=c.TrainConfig(
            num_steps=2000,
            schedule=c.Cosine(total_steps=2000, warmup_steps=100),
            checkpoint_every=500,
            eval_every=500,
        ),
    )
