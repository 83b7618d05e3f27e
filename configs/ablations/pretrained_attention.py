"""SmolLM2-135M with its full attention replaced by windowed patterns, without training, on held-out prose and code.

.venv/bin/python experiments/ablate.py --table=pretrained_attention --workdir=/tmp/pretrained_attention

About half an hour on two cores. More, for instance on a GPU: `--config.tokens=65536 --config.held_out_fraction=0.5
--config.contexts="(512, 2048, 8192)"`.
"""

from dsv3_jax import config as c

FIRST_FOUR = (0, 1, 2, 3)


def get_ablation() -> c.PretrainedAblation:
    """Sliding, overlapping and disjoint windows of three sizes, each with and without the first four tokens."""
    rows: dict[str, c.Pattern] = {"full": c.Full(), "full, by segments of 256": c.Segmented(256, keys="all")}
    for window in (64, 256, 512):
        for kind, stride in (("sliding", 1), ("overlapping", window // 2), ("disjoint", window)):
            rows[f"{kind} {window}"] = c.Windowed(window, stride=stride)
            rows[f"{kind} {window} + 4 global"] = c.Windowed(window, FIRST_FOUR, stride=stride)
    return c.PretrainedAblation(
        title="SmolLM2-135M, attention replaced without training",
        rows=rows,
        baseline="full",
        repeat="full, by segments of 256",
        contexts=(512, 2048),
    )
