"""The table of combinations: every option with every other one is trained, checked and decoded, or refused by name.

An axis is a list of values, a value a few edits of a config, a cell one value of each axis. `Config.validate()` says
which cells there are; `cover` picks a few that hold every value once, or every pair of values; `cell_checks` runs one.
"""

import copy
import dataclasses
import functools
import itertools
import random
from collections.abc import Iterable
from typing import Any

import jax

from dsv3_jax import config as c
from dsv3_jax.models.transformer import make_cache

Cell = dict[str, str]  # axis -> name of its value
Option = tuple[str, str]  # axis, name of a value

LATENT = c.Latent(num_heads=2, query_latent_dim=16, latent_dim=8, nope_head_dim=8, rope_head_dim=8, value_head_dim=8)
SPARSE = c.Sparse(top_k=5, index_heads=2, index_dim=8)


def base_config() -> c.Config:
    """The first value of each axis: one dense layer, two with eight experts; every loss term of the router is on."""
    router = c.GroupedSigmoid(2, 4, 2, balance_weight=1e-2, z_weight=1e-3)
    return c.Config(
        model=c.ModelConfig(
            vocab_size=272,
            dim=32,
            num_layers=3,
            dense_dim=32,
            attention=c.Attention(projection=LATENT, pattern=c.Full()),
            moe=c.MixtureOfExperts(num_experts=8, expert_dim=16, router=router),
            unroll=True,
        ),
        data=c.DataConfig(tokenizer=c.BpeTokenizer(260), sequence_length=24),
        train=c.TrainConfig(
            batch_size=2,
            optimizer=c.AdamW(learning_rate=1e-2, base_dim=32),
            schedule=c.Cosine(total_steps=20, warmup_steps=0),
        ),
    )


Edits = dict[str, Any]  # dotted field of the config -> its value


def _patterns() -> dict[str, Edits]:
    """Kinds that differ in numbers alone share a value, layer by layer: so are per-layer patterns covered too."""
    windows = c.PerLayer((c.Windowed(6, (1,), stride=3), c.Windowed(6, stride=6)))
    patterns: dict[str, c.Pattern] = {
        "window with globals": c.Windowed(4, (0, 2, 9)),
        "sliding window, full": c.PerLayer((c.Windowed(6), c.Full())),
        "windows: overlapping, disjoint": windows,
        "segmented: keys of it, of all": c.PerLayer((c.Segmented(6), c.Segmented(6, keys="all"))),
        "run-time window": c.RuntimeWindowed(6, (0,), (c.TaskWindow("code", 3),)),
        "learned globals": c.LearnedGlobal(4, 4, 2),
        "sparse": SPARSE,
    }
    warmup = {
        "model.attention.pattern": dataclasses.replace(SPARSE, stage="warmup"),
        "train.trainable": ("indexer",),
    }
    edits: dict[str, Edits] = {name: {"model.attention.pattern": pattern} for name, pattern in patterns.items()}
    return {"full": {}} | edits | {"sparse, warming up": warmup}


def _routers() -> dict[str, Edits]:
    routers: dict[str, c.Router] = {
        "softmax": c.Softmax(2, z_weight=1e-3),
        "softmax with groups": c.Softmax(2, 4, 2, bias_update_rate=1e-3, z_weight=1e-3),
        "probability mass": c.ProbabilityMass(1, 3, 2.0, 0.3, z_weight=1e-3),
    }
    edits: dict[str, Edits] = {name: {"model.moe.router": router} for name, router in routers.items()}
    return {"grouped sigmoid": {}} | edits | {"no experts": {"model.moe": None, "model.num_dense_layers": 3}}


def _projections() -> dict[str, Edits]:
    projections: dict[str, c.Projection] = {
        "latent, no query compression": dataclasses.replace(LATENT, query_latent_dim=None),
        "grouped query": c.GroupedQuery(4, 2, 8),
        "grouped query, qk norm": c.GroupedQuery(4, 2, 8, qk_norm=True),
    }
    edits: dict[str, Edits] = {name: {"model.attention.projection": value} for name, value in projections.items()}
    return {"latent": {}} | edits


# The first value of an axis is that of `base_config`. Fields are set in this order.
AXES: dict[str, dict[str, Edits]] = {
    "projection": _projections(),
    "pattern": _patterns(),
    "scores": {
        "plain": {},
        "sinks": {"model.attention.sinks": True},
        "softcap": {"model.attention.softcap": 3.0},
    },
    "router": _routers(),
    "experts": {
        "feed forward": {},
        "several widths": {"model.moe.expert": c.FeedForward(widths=(8, 16, 4))},
        "deep": {"model.moe.expert": c.DeepExpert(num_layers=2, num_heads=2, head_dim=8)},
    },
    "combination": {
        "weighted sum": {},
        "cross-expert attention": {"model.moe.combination": c.CrossExpertAttention(2, 8)},
    },
    "condition": {"none": {}, "by task": {"model.moe.condition": c.Condition(("code",), 4)}},
    "exploration": {
        "none": {},
        "router noise": {"model.moe.router_noise": 0.3},
        "expert dropout": {"model.moe.expert_dropout": 0.2},
    },
    "dispatch": {
        "grouped": {},
        "dense": {"model.moe.dispatch": c.DenseDispatch()},
        "capacity": {"model.moe.dispatch": c.CapacityDispatch(1.25)},
    },
    "unit gate": {"none": {}, "on": {"model.unit_gate": c.UnitGate(blocks=4, gate_dim=4)}},
    "multi-token prediction": {
        "none": {},
        "depth 1": {"model.mtp": c.MultiToken(1)},
        "depth 2": {"model.mtp": c.MultiToken(2)},
    },
    "remat": {"none": {}, "dots": {"model.remat": "dots"}, "full": {"model.remat": "full"}},
    "precision": {"float32": {}, "bfloat16": {"model.compute_dtype": "bfloat16"}},
    "rows": {"packed": {}, "one document": {"data.max_segments": 1}},
    "layers": {"unrolled": {}, "scanned": {"model.unroll": False}},
    "embeddings": {"apart": {}, "tied": {"model.tie_embeddings": True}},
}


def options() -> list[Option]:
    """Every value of every axis."""
    return [(axis, name) for axis, values in AXES.items() for name in values]


def default_cell() -> Cell:
    """The first value of each axis."""
    return {axis: next(iter(values)) for axis, values in AXES.items()}


def _assign(config: c.Config, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node: Any = config
    for depth, name in enumerate(parents):
        node = getattr(node, name)
        if node is None:
            raise c.ConfigError(f"config.{'.'.join(parents[: depth + 1])} is None, which has no field {last!r}")
    setattr(node, last, copy.deepcopy(value))


def make_config(cell: Cell) -> c.Config:
    """The validated config of a cell; axes it does not name have their first value. Raises `ConfigError`."""
    config = base_config()
    for axis, name in (default_cell() | cell).items():
        for path, value in AXES[axis][name].items():
            _assign(config, path, value)
    return config.validate()


def refusal(cell: Cell) -> str | None:
    """Why there is no such cell, as the error says it; None if there is."""
    try:
        make_config(cell)
    except c.ConfigError as error:
        return str(error)
    return None


@functools.cache
def refused_pairs() -> dict[frozenset[Option], str]:
    """The pairs of values that cannot be, all other axes at their first value, and the error's text."""
    found = {}
    for a, b in itertools.combinations(options(), 2):
        text = refusal(dict((a, b))) if a[0] != b[0] else None
        if text is not None:
            found[frozenset((a, b))] = text
    return found


def names_option(text: str, option: Option) -> bool:
    """Whether a refusal speaks of an option: of a field that it sets, or of the kind that it sets it to."""
    axis, name = option
    for path, value in AXES[axis][name].items():
        last, kind = path.split(".")[-1], getattr(value, "kind", None)
        said = (f"{path} is None", f"{path}=None") if value is None else (f"'{last}'", f"{path}=", str(kind))
        if any(word in text for word in said):
            return True
    return False


def _targets(size: int, refused: Iterable[frozenset[Option]]) -> list[frozenset[Option]]:
    refused = set(refused)
    chosen = (frozenset(group) for group in itertools.combinations(options(), size))
    return [g for g in chosen if len({axis for axis, _ in g}) == size and g not in refused]


def decodes(cell: Cell) -> bool:
    """Whether there is a cache for a cell."""
    model = make_config(cell).model
    try:
        jax.eval_shape(lambda: make_cache(model, 1, 2))
    except c.ConfigError:
        return False
    return True


def cover(size: int, seed: int = 7, tries: int = 30) -> list[Cell]:
    """Cells that hold every value (size 1), or every accepted pair of values (size 2) and every pair of values that
    decode in a cell that does; few, not the fewest."""
    chance, targets = random.Random(seed), _targets(size, refused_pairs())
    cells = _fill(dict.fromkeys(targets), size, frozenset(), chance, tries)
    if size == 1:
        return cells
    without = frozenset(option for option in options() if not decodes(dict([option])))
    decoded = {target for cell in cells if not without & set(cell.items()) for target in _held(cell, size)}
    missing = dict.fromkeys(target for target in targets if target not in decoded and not target & without)
    return cells + _fill(missing, size, without, chance, tries)


def _held(cell: Cell, size: int) -> set[frozenset[Option]]:
    return {frozenset(group) for group in itertools.combinations(cell.items(), size)}


def _fill(
    still_open: dict[frozenset[Option], None], size: int, without: frozenset[Option], chance: random.Random, tries: int
) -> list[Cell]:
    """Cells, of other values than `without`, that hold all targets, which are taken out of `still_open`.

    Each cell begins with a target that is still open; axes then take, in random order, the value that closes most
    others; the best of several tries is kept (the greedy way of Cohen et al. 1997, "The AETG system").
    """
    cells, refused = [], refused_pairs()

    def attempt(first: frozenset[Option]) -> Cell:
        cell = dict(first)
        rest = [axis for axis in AXES if axis not in cell]
        chance.shuffle(rest)
        for axis in rest:
            names = [name for name in AXES[axis] if (axis, name) not in without]
            names = [n for n in names if not any(frozenset(((axis, n), other)) in refused for other in cell.items())]
            if size > 1:  # of equals any one; with size 1 the first, which is cheap
                chance.shuffle(names)
            cell[axis] = max(names, key=lambda name: len(_held({**cell, axis: name}, size) & still_open.keys()))
        return {axis: cell[axis] for axis in AXES}

    while still_open:
        first = next(iter(still_open))
        candidates = [cell for cell in (attempt(first) for _ in range(tries)) if refusal(cell) is None]
        if not candidates:
            raise RuntimeError(f"no accepted cell holds {dict(first)}, although validate() takes it alone")
        cells.append(max(candidates, key=lambda cell: len(_held(cell, size) & still_open.keys())))
        for target in _held(cells[-1], size):
            still_open.pop(target, None)
    return cells
