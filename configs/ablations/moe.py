"""Routers, experts and their dispatch at equal training FLOPs a token: 18 rows, three seeds each, on the same tokens.

.venv/bin/python experiments/ablate.py --table=moe --workdir=/tmp/moe
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c

# Row -> file of configs/moe. All of a file's widths are chosen so that a token costs what it costs in `published_v3`.
ROWS = {
    "published V3": "published_v3",
    "dense": "dense",
    "softmax, k = 4": "softmax_balance_z",
    "softmax, k = 3": "fixed_k3",
    "softmax, k = 2": "fixed_k2",
    "softmax, k = 2 to 4 by token": "per_token_k",
    "softmax, top 2 of 8": "top2_of_8",
    "128 experts in 8 groups + condition": "experts_128_in_8_groups",
    "condition on tasks": "task_condition",
    "cross-expert attention": "cross_expert_attention",
    "deep experts, top 2 of 8": "deep_experts",
    "dense, 70 % of units on": "dynamic_units",
    "capacity 1.25": "capacity",
    "no shared expert": "no_shared_expert",
    "experts of four widths": "widths",
    "noise and expert dropout": "noise_dropout",
}
NUM_STEPS = 80


def get_ablation() -> c.Ablation:
    """One row a file of configs/moe; expansion on a schedule; and gated units without the wider MLP (fewer FLOPs)."""
    folder = pathlib.Path(__file__).parent.parent / "moe"
    configs = {name: c.load_module(str(folder / f"{file}.py")).get_config() for name, file in ROWS.items()}
    base, gated, dense = (configs[name] for name in ("published V3", "dense, 70 % of units on", "dense"))
    growth = c.Expansion(initial_experts=8, steps=(NUM_STEPS // 2,), ramp_steps=NUM_STEPS // 10)
    configs["8 experts, then 16"] = replace(base, train=replace(base.train, growth=growth))
    narrow = replace(gated.model, dense_dim=dense.model.dense_dim // 16 * 16)
    configs["dense, 70 % on, not widened"] = replace(gated, model=narrow)
    rows = {}
    for name, config in configs.items():
        train = replace(
            config.train,
            num_steps=NUM_STEPS,
            batch_size=4,
            schedule=c.Cosine(total_steps=NUM_STEPS, warmup_steps=NUM_STEPS // 10),
            checkpoint_every=NUM_STEPS,
            keep_checkpoints=1,
            eval_every=NUM_STEPS,
            eval_rows=32,
        )
        rows[name] = replace(config, data=replace(config.data, sequence_length=512), train=train)
    against = {
        "softmax, k = 2 to 4 by token": "softmax, k = 3",
        "deep experts, top 2 of 8": "softmax, top 2 of 8",
        "dense, 70 % of units on": "dense",
        "dense, 70 % on, not widened": "dense",
    }
    return c.Ablation(
        title="Mixture of experts at equal training FLOPs a token",
        rows=rows,
        baseline="published V3",
        seeds=(0, 1, 2),
        against=against,
        routing=True,
    )
