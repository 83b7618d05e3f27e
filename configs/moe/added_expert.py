"""A seventeenth expert is added to one layer of a trained model, and trained alone on another domain: speeches.

Train the model first (prose and code, 16 experts in one group), then add to it:

    .venv/bin/python experiments/train.py --config=configs/tiny.py --workdir=/tmp/sixteen \\
        --config.model.moe.num_experts=16 --config.model.moe.router.num_groups=1 --config.model.moe.router.top_groups=1
    .venv/bin/python experiments/train.py --config=configs/moe/added_expert.py --workdir=/tmp/added_expert \\
        --init_from=/tmp/sixteen --config.data.tokenizer.path=/tmp/sixteen/tokenizer.json
"""

import pathlib
from dataclasses import replace

from dsv3_jax import config as c


def get_config() -> c.Config:
    """`configs/tiny.py` with 17 experts, the last one in the second layer with experts, a copy of the first one."""
    base = c.load_module(str(pathlib.Path(__file__).parent.parent / "tiny.py")).get_config()
    router = c.GroupedSigmoid(top_k=2, num_groups=1, top_groups=1)
    moe = replace(base.model.moe, num_experts=17, router=router)
    domains = (c.Domain("speeches", c.Speeches(), 1.0),)
    data = replace(base.data, domains=domains, tokenizer=c.TokenizerFile("tokenizer.json"))
    growth = c.AddedExpert(layer=1, parent=0, ramp_steps=20)
    train = replace(base.train, num_steps=100, schedule=c.Cosine(total_steps=100, warmup_steps=10), growth=growth)
    return replace(base, model=replace(base.model, moe=moe), data=data, train=train)
