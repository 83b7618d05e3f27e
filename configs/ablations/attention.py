"""Four attention patterns on the demo model, two seeds each, the same tokens for all. About six minutes on two cores.

.venv/bin/python experiments/ablate.py --table=attention --workdir=/tmp/attention
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c

PATTERNS = {
    "full": c.Full(),
    "window 128": c.Windowed(128),
    "window 128 + 4 global": c.Windowed(128, global_positions=(0, 1, 2, 3)),
    "segments of 128": c.Segmented(128),
}
NUM_STEPS = 70


def get_ablation() -> c.Ablation:
    """One row a pattern."""
    base = c.load_module(str(pathlib.Path(__file__).parent.parent / "tiny.py")).get_config()
    train = replace(
        base.train,
        num_steps=NUM_STEPS,
        batch_size=2,
        schedule=c.Cosine(total_steps=NUM_STEPS, warmup_steps=7),
        checkpoint_every=NUM_STEPS,
        keep_checkpoints=1,
        eval_every=NUM_STEPS,
        eval_rows=32,
    )
    rows = {}
    for name, pattern in PATTERNS.items():
        attention = replace(base.model.attention, pattern=pattern)
        rows[name] = replace(base, model=replace(base.model, attention=attention), train=train)
    return c.Ablation(title="Attention patterns", rows=rows, baseline="full")
