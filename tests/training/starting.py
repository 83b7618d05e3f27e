"""What tests of growth and upcycling share."""

import dataclasses

import jax

from dsv3_jax import config as c
from dsv3_jax.interop.huggingface import flat
from dsv3_jax.models.transformer import Transformer
from dsv3_jax.sharding import make_mesh
from dsv3_jax.training import growth
from dsv3_jax.training.loop import _grow
from dsv3_jax.training.sources import check_fit, open_source, take
from dsv3_jax.training.step import Trainer, TrainState
from dsv3_jax.training.upcycling import fit_experts


def leaf(tree, *names):
    for name in names:
        tree = tree[name]
    return tree


def forward(config: c.ModelConfig):
    return jax.jit(lambda variables, tokens: Transformer(config).apply(variables, tokens))


def started(init_from, config: c.Config) -> tuple[Trainer, TrainState, tuple[str, ...]]:
    """The trainer, the state that a new run begins with, grown where that is due, and what is said of its source."""
    trainer = Trainer(config, make_mesh(config.mesh))
    wanted = flat(trainer.abstract_state().variables())
    source = fit_experts(open_source(str(init_from)), config, trainer.expert_axes, wanted)
    source = check_fit(source, config.model, wanted)
    state = trainer.init(0)
    taken = take(source, state.variables(), trainer.abstract_state().variables())
    for path, asked in wanted.items():
        assert flat(taken)[path].sharding == asked.sharding and flat(taken)[path].dtype == asked.dtype
    state = dataclasses.replace(state, **taken)
    return trainer, _grow(trainer, state, 0, growth.stages(config.train.growth, config.model.moe))[0], source.notes
