"""Multi-token prediction: depth 0 to 3 on the same tokens, and depth 0 with the FLOPs of depth 1; three seeds each.

A module costs a block and another pass through the vocabulary head, so that equal FLOPs on equal tokens would take
another model. Two questions are asked instead: of the same tokens (every row but one), and of the same FLOPs (the row
that trains for more steps). Quality is the bits per byte of the main head.

.venv/bin/python experiments/ablate.py --table=mtp --workdir=/tmp/mtp
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c

DEPTHS = {
    "depth 0": None,
    "depth 1": c.MultiToken(depth=1),
    "depth 2": c.MultiToken(depth=2),
    "depth 3": c.MultiToken(depth=3),
}
NUM_STEPS = 60
NUM_STEPS_AT_EQUAL_FLOPS = 98  # of depth 0: as many FLOPs as NUM_STEPS of depth 1
LONGER = "depth 0, FLOPs of depth 1"


def get_ablation() -> c.Ablation:
    """`configs/moe/published_v3.py` with each depth."""
    file = pathlib.Path(__file__).parent.parent / "moe" / "published_v3.py"
    base = c.load_module(str(file)).get_config()
    data = replace(base.data, sequence_length=512)

    def row(mtp: c.MultiToken | None, steps: int) -> c.Config:
        train = replace(
            base.train,
            num_steps=steps,
            batch_size=4,
            schedule=c.Cosine(total_steps=steps, warmup_steps=steps // 10),
            checkpoint_every=steps,
            keep_checkpoints=1,
            eval_every=steps,
            eval_rows=32,
        )
        return replace(base, model=replace(base.model, mtp=mtp), data=data, train=train)

    rows = {name: row(mtp, NUM_STEPS) for name, mtp in DEPTHS.items()}
    late = c.MultiToken(depth=1, weight=0.3, late_weight=0.1, late_step=NUM_STEPS // 2)
    rows["depth 1, weight 0.3 then 0.1"] = row(late, NUM_STEPS)
    rows[LONGER] = row(None, NUM_STEPS_AT_EQUAL_FLOPS)
    return c.Ablation(
        title="Multi-token prediction",
        rows=rows,
        baseline="depth 0",
        seeds=(0, 1, 2),
        against={"depth 1, weight 0.3 then 0.1": "depth 1", LONGER: "depth 1"},
        own_length=(LONGER,),
        routing=True,
    )
