"""What cannot run is refused here, before anything is built."""

import dataclasses
import itertools

from dsv3_jax.config.attention import RuntimeWindowed, Sparse
from dsv3_jax.config.checks import ConfigError, check_types, require, require_one_of, require_positive
from dsv3_jax.config.experts import DenseDispatch, FeedForward, GroupedDispatch, GroupedSigmoid
from dsv3_jax.config.model_validation import check_model, pattern_members
from dsv3_jax.config.schema import (
    DTYPES,
    AddedExpert,
    BpeTokenizer,
    Config,
    DataConfig,
    Domain,
    Expansion,
    TrainConfig,
    WarmupStableDecay,
)


def validate(config: Config) -> None:
    """Raises `ConfigError` naming the first field that cannot work."""
    check_types(config)
    check_model(config.model)
    require(
        config.model.attention.causal,
        "model.attention.causal",
        False,
        "must be true in training: queries that see later keys would see the tokens they are to predict",
    )
    _validate_layers(config)
    _validate_trainable(config)
    _validate_tasks(config)
    _validate_router(config)
    _validate_growth(config)
    _validate_data(config.data)
    _validate_train(config.train)
    _validate_mesh(config)
    require(
        config.model.attention.implementation != "cudnn" or config.data.max_segments == 1,
        "data.max_segments",
        config.data.max_segments,
        "must be 1 with model.attention.implementation=cudnn, which takes one document a row",
    )
    model, optimizer = config.model, config.train.optimizer
    require(
        not model.tie_embeddings or optimizer.base_dim == model.dim,
        "model.tie_embeddings",
        True,
        f"needs train.optimizer.base_dim={model.dim}, the model's width: the width rule has no form for tied weights",
    )
    tokenizer = config.data.tokenizer
    if isinstance(tokenizer, BpeTokenizer):
        require(
            tokenizer.vocab_size <= config.model.vocab_size,
            "data.tokenizer.vocab_size",
            tokenizer.vocab_size,
            f"must be at most model.vocab_size={config.model.vocab_size}",
        )


def _validate_layers(config: Config) -> None:
    """What would be trained without a word and do nothing."""
    model, length = config.model, config.data.sequence_length
    require(
        model.moe is None or model.num_dense_layers < model.num_layers,
        "model.num_dense_layers",
        model.num_dense_layers,
        "leaves no layer for the experts of model.moe; lower it, or set model.moe=none",
    )
    require(
        model.mtp is None or model.mtp.depth < length,
        "model.mtp.depth",
        0 if model.mtp is None else model.mtp.depth,
        f"must be below data.sequence_length={length}: no token stands that far ahead in a row",
    )
    mtp, total = model.mtp, config.train.schedule.total_steps
    later = mtp is not None and mtp.late_weight > 0 and mtp.late_step is not None and mtp.late_step < total
    require(
        mtp is None or mtp.weight > 0 or later,
        "model.mtp.weight",
        0.0,
        "computes modules that nothing trains; set model.mtp=none, or a late_weight from a late_step of this run on",
    )


def _validate_router(config: Config) -> None:
    moe = config.model.moe
    if moe is None or moe.num_experts == 1:
        return
    router = moe.router
    require(
        router.top_k > 1 or not router.normalize_weights,
        "model.moe.router.normalize_weights",
        True,
        "must be false with model.moe.router.top_k=1 in training: the weight of one expert is 1 whatever its score,"
        " and the router learns nothing from the text",
    )


def _validate_tasks(config: Config) -> None:
    names = [domain.name for domain in config.data.domains]
    given = [
        ("attention.pattern.tasks", entry.task)
        for pattern in pattern_members(config.model.attention.pattern)
        for entry in (pattern.tasks if isinstance(pattern, RuntimeWindowed) else ())
    ]
    moe = config.model.moe
    if moe is not None and moe.condition is not None:
        given += [("moe.condition.tasks", task) for task in moe.condition.tasks]
    for field, task in given:
        require(
            task in names, f"model.{field}", task, f"a task is a domain in training; the domains are {', '.join(names)}"
        )


def _validate_growth(config: Config) -> None:
    growth, moe, name = config.train.growth, config.model.moe, "train.growth"
    if growth is None:
        return
    sparse_layers = config.model.num_layers - config.model.num_dense_layers
    require(moe is not None and sparse_layers > 0, name, growth.kind, "needs mixture-of-experts layers (model.moe)")
    assert moe is not None
    router = moe.router
    if not isinstance(router, GroupedSigmoid):
        raise ConfigError(
            f"config.{name}={growth.kind}: needs model.moe.router=grouped_sigmoid, given {router.kind}: in a softmax a"
            " new expert changes the scores of all others, so that the model would jump"
        )
    require(
        isinstance(moe.dispatch, DenseDispatch | GroupedDispatch),
        name,
        growth.kind,
        f"needs model.moe.dispatch=grouped or dense, given {moe.dispatch.kind}: the room of an expert follows from"
        " num_experts, whether they are active or not",
    )
    require(
        not (isinstance(moe.expert, FeedForward) and moe.expert.widths),
        name,
        growth.kind,
        "needs experts of one width (model.moe.expert.widths empty): a copy may be of another width than its parent",
    )
    require(
        not config.train.trainable,
        name,
        growth.kind,
        f"needs train.trainable to be empty, given {config.train.trainable}: growth says what is trained",
    )
    require(
        router.z_weight == 0,
        "model.moe.router.z_weight",
        router.z_weight,
        f"must be 0 with {name}={growth.kind}: the z loss sums over experts, and would jump with their number",
    )
    require_positive(growth, name, "ramp_steps")
    match growth:
        case Expansion():
            _validate_expansion(growth, moe.num_experts, router)
            end = growth.steps[-1] + growth.ramp_steps
        case AddedExpert():
            _validate_added_expert(growth, moe.num_experts, router, sparse_layers)
            end = growth.ramp_steps
    total = config.train.schedule.total_steps
    require(
        end <= total,
        f"{name}.ramp_steps",
        growth.ramp_steps,
        f"the last new expert is in full use at step {end}, after train.schedule.total_steps={total}",
    )


def _validate_expansion(growth: Expansion, experts: int, router: GroupedSigmoid) -> None:
    name, first, steps, ramp = "train.growth", growth.initial_experts, growth.steps, growth.ramp_steps
    require(
        first >= 1 and first * 2 ** len(steps) == experts,
        f"{name}.initial_experts",
        first,
        f"doubled {len(steps)} times must give model.moe.num_experts={experts}",
    )
    gaps = [later - step for step, later in itertools.pairwise(steps)]
    require(
        len(steps) > 0 and steps[0] > 0 and all(gap >= ramp for gap in gaps),
        f"{name}.steps",
        steps,
        f"must be at least one step, each at least ramp_steps={ramp} after the one before, the first above 0",
    )
    group = first // router.num_groups
    require(
        first % router.num_groups == 0
        and (group >= 2 or router.num_groups == 1)
        and router.top_k <= router.top_groups * group,
        f"{name}.initial_experts",
        first,
        f"must be at least 2 in each of router.num_groups={router.num_groups} groups, and top_k={router.top_k}"
        f" in top_groups={router.top_groups} of them",
    )


def _validate_added_expert(growth: AddedExpert, experts: int, router: GroupedSigmoid, sparse_layers: int) -> None:
    name, layer, parent = "train.growth", growth.layer, growth.parent
    require(0 <= layer < sparse_layers, f"{name}.layer", layer, f"must be between 0 and {sparse_layers - 1}")
    require(0 <= parent < experts - 1, f"{name}.parent", parent, f"must be between 0 and {experts - 2}")
    require(
        router.num_groups == 1,
        "model.moe.router.num_groups",
        router.num_groups,
        f"must be 1 with {name}=added_expert: one more expert leaves groups of unequal size",
    )
    require(router.top_k < experts, name, growth.kind, f"needs more than router.top_k={router.top_k} experts")


def _validate_trainable(config: Config) -> None:
    members = pattern_members(config.model.attention.pattern)
    warming = any(isinstance(member, Sparse) and member.stage == "warmup" for member in members)
    require(
        not warming or config.train.trainable == ("indexer",),
        "train.trainable",
        config.train.trainable,
        'must be ("indexer",) while a sparse pattern has stage=warmup: it trains the indexer alone',
    )


def validate_domains(domains: tuple[Domain, ...], held_out_fraction: float, prefix: str) -> None:
    """Raises `ConfigError` for domains that cannot be told apart or read, or a share that leaves nothing."""
    name = f"{prefix}domains"
    require(len(domains) > 0, name, domains, "must hold at least one domain")
    names = [domain.name for domain in domains]
    require(len(set(names)) == len(names), name, names, "must have distinct names")
    for index, domain in enumerate(domains):
        require(domain.weight >= 0, f"{name}.{index}.weight", domain.weight, "must be at least 0")
        require("/" not in domain.name, f"{name}.{index}.name", domain.name, "must hold no '/'")
        path = getattr(domain.corpus, "path", None)
        require(path != "", f"{name}.{index}.corpus.path", path, "must name a file or folder")
    require(0 < held_out_fraction < 1, f"{prefix}held_out_fraction", held_out_fraction, "must be between 0 and 1")


def _validate_data(data: DataConfig) -> None:
    require_positive(data, "data", "sequence_length", "max_segments")
    validate_domains(data.domains, data.held_out_fraction, "data.")
    require(any(d.weight > 0 for d in data.domains), "data.domains", data.domains, "must hold a weight above 0")
    if isinstance(data.tokenizer, BpeTokenizer):
        require(
            data.tokenizer.vocab_size >= 259,
            "data.tokenizer.vocab_size",
            data.tokenizer.vocab_size,
            "must be at least 259: 256 bytes and 3 special tokens",
        )


def _validate_train(train: TrainConfig) -> None:
    require_positive(train, "train", "batch_size", "microbatches", "keep_checkpoints", "eval_rows", "log_every")
    require_positive(train, "train", "num_steps", "checkpoint_every", "eval_every", minimum=0)
    require(
        train.batch_size % train.microbatches == 0,
        "train.batch_size",
        train.batch_size,
        f"must be a multiple of train.microbatches={train.microbatches}",
    )
    require_positive(train.optimizer, "train.optimizer", "base_dim")
    require(
        train.optimizer.learning_rate > 0,
        "train.optimizer.learning_rate",
        train.optimizer.learning_rate,
        "must be positive",
    )
    schedule = train.schedule
    require_positive(schedule, "train.schedule", "warmup_steps", minimum=0)
    spent = schedule.warmup_steps + (schedule.decay_steps if isinstance(schedule, WarmupStableDecay) else 0)
    require(
        0 <= spent <= schedule.total_steps,
        "train.schedule.total_steps",
        schedule.total_steps,
        f"must be at least the {spent} steps of warm-up and decay",
    )
    for name in ("first_moment_dtype", "second_moment_dtype"):
        require_one_of(train.optimizer, "train.optimizer", name, DTYPES)
    require(train.optimizer.clip_norm > 0, "train.optimizer.clip_norm", train.optimizer.clip_norm, "must be positive")


def _validate_mesh(config: Config) -> None:
    mesh = config.mesh
    names = [axis.name for axis in dataclasses.fields(mesh)]
    require_positive(mesh, "mesh", *names)
    for name in ("pipeline", "context"):
        size = getattr(mesh, name)
        require(size == 1, f"mesh.{name}", size, f"must be 1: there is no {name} parallelism yet; use data or fsdp")
    rows = config.train.batch_size // config.train.microbatches
    batch_shards = mesh.data * mesh.fsdp * mesh.expert
    require(
        rows % batch_shards == 0,
        "train.batch_size",
        config.train.batch_size,
        f"each of {config.train.microbatches} micro-batch(es) must split over mesh.data x fsdp x expert"
        f" = {batch_shards} devices",
    )
