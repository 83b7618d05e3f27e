"""What cannot run is refused here, before anything is built."""

import dataclasses
from typing import Any

from dsv3_jax.config.checks import check_types, require
from dsv3_jax.config.schema import (
    DTYPES,
    REMAT_POLICIES,
    SPARSE_KERNELS,
    WINDOWED_KERNELS,
    BpeTokenizer,
    Config,
    DataConfig,
    Domain,
    GroupedQuery,
    GroupedSigmoid,
    LayerPattern,
    LearnedGlobal,
    Llama3Scaling,
    MixtureOfExperts,
    ModelConfig,
    Pattern,
    PerLayer,
    RopeScaling,
    RuntimeWindowed,
    Segmented,
    Sparse,
    TrainConfig,
    WarmupStableDecay,
    Windowed,
    Yarn,
)


def validate(config: Config) -> None:
    """Raises `ConfigError` naming the first field that cannot work."""
    check_types(config)
    _validate_model(config.model)
    require(
        config.model.attention.causal,
        "model.attention.causal",
        False,
        "must be true in training: queries that see later keys would see the tokens they are to predict",
    )
    _validate_trainable(config)
    _validate_tasks(config)
    _validate_data(config.data)
    _validate_train(config.train)
    _validate_mesh(config)
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


def _require_positive(owner: Any, prefix: str, *names: str, minimum: float = 1) -> None:
    for name in names:
        value = getattr(owner, name)
        require(value >= minimum, f"{prefix}.{name}", value, f"must be at least {minimum}")


def _require_one_of(owner: Any, prefix: str, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(owner, name)
    require(value in choices, f"{prefix}.{name}", value, f"must be one of {', '.join(choices)}")


def validate_model(model: ModelConfig) -> None:
    """Raises `ConfigError` for a model that cannot be built, whatever it is for."""
    check_types(model, "model.")
    _validate_model(model)


def validate_pattern(pattern: Pattern, causal: bool = True, prefix: str = "model.attention.pattern") -> None:
    """Raises `ConfigError` for a pattern with a value that cannot be."""
    match pattern:
        case Windowed():
            _require_positive(pattern, prefix, "window")
            _validate_stride(pattern, prefix)
            _validate_positions(pattern.global_positions, f"{prefix}.global_positions")
            fractions, name = pattern.global_fractions, f"{prefix}.global_fractions"
            require(all(0 <= f <= 1 for f in fractions), name, fractions, "must be between 0 and 1")
            require(
                not (causal and fractions),
                name,
                fractions,
                "a share of the length is not known while a text grows: use global_positions, or"
                " model.attention.causal=false",
            )
        case RuntimeWindowed():
            _require_positive(pattern, prefix, "window")
            _validate_positions(pattern.global_positions, f"{prefix}.global_positions")
            for index, entry in enumerate(pattern.tasks):
                require(
                    1 <= entry.window <= pattern.window,
                    f"{prefix}.tasks.{index}.window",
                    entry.window,
                    f"must be between 1 and the largest window, {pattern.window}",
                )
            names = [entry.task for entry in pattern.tasks]
            require(len(set(names)) == len(names), f"{prefix}.tasks", names, "must name each task once")
        case Segmented():
            _require_positive(pattern, prefix, "segment")
            _require_one_of(pattern, prefix, "keys", ("segment", "all"))
        case LearnedGlobal():
            _require_positive(pattern, prefix, "window", "top_k")
            _validate_stride(pattern, prefix)
        case Sparse():
            _require_positive(pattern, prefix, "top_k", "index_heads", "index_dim")
            _require_one_of(pattern, prefix, "stage", ("warmup", "sparse"))
            require(pattern.loss_weight >= 0, f"{prefix}.loss_weight", pattern.loss_weight, "must be at least 0")
            if pattern.stage == "sparse":
                require(
                    pattern.top_k >= 2, f"{prefix}.top_k", pattern.top_k, "must be at least 2: one key teaches nothing"
                )
            else:
                require(
                    pattern.loss_weight > 0, f"{prefix}.loss_weight", 0, "must be positive: warm-up has no other loss"
                )
        case PerLayer():
            _validate_cycle(pattern, causal, prefix)


def _validate_stride(pattern: Windowed | LearnedGlobal, prefix: str) -> None:
    require(
        1 <= pattern.stride <= pattern.window,
        f"{prefix}.stride",
        pattern.stride,
        f"must be between 1 and the window, {pattern.window}: beyond it, tokens between two windows would see nothing",
    )


def _validate_positions(positions: tuple[int, ...], name: str) -> None:
    distinct = len(set(positions)) == len(positions)
    require(all(p >= 0 for p in positions) and distinct, name, positions, "must be distinct positions of at least 0")


def _validate_cycle(pattern: PerLayer, causal: bool, prefix: str) -> None:
    require(len(pattern.patterns) > 0, f"{prefix}.patterns", pattern.patterns, "must hold at least one pattern")
    for index, member in enumerate(pattern.patterns):
        validate_pattern(member, causal, f"{prefix}.patterns.{index}")
    for cls, differing in ((LearnedGlobal, ()), (Sparse, ("index_heads", "index_dim", "loss_weight", "stage"))):
        members = [p for p in pattern.patterns if isinstance(p, cls)]
        require(
            len(members) in (0, len(pattern.patterns)),
            f"{prefix}.patterns",
            [p.kind for p in pattern.patterns],
            f"{cls.kind} has parameters of its own and layers are stacked: all patterns must be it, or none",
        )
        for name in differing:
            values = [getattr(p, name) for p in members]
            require(len(set(values)) <= 1, f"{prefix}.patterns.*.{name}", values, "must be the same in every layer")
    tasks = [p.tasks for p in pattern.patterns if isinstance(p, RuntimeWindowed)]
    require(all(t == tasks[0] for t in tasks), f"{prefix}.patterns.*.tasks", tasks, "must be the same in every layer")


def _validate_scaling(scaling: RopeScaling | None, prefix: str = "model.attention.rope_scaling") -> None:
    if scaling is None:
        return
    require(scaling.factor >= 1, f"{prefix}.factor", scaling.factor, "must be at least 1")
    if isinstance(scaling, Yarn | Llama3Scaling):
        _require_positive(scaling, prefix, "original_length")
    if isinstance(scaling, Llama3Scaling):
        require(
            scaling.high_factor > scaling.low_factor > 0,
            f"{prefix}.high_factor",
            scaling.high_factor,
            f"must be above low_factor={scaling.low_factor}, and that above 0",
        )
    if isinstance(scaling, Yarn):
        require(
            scaling.beta_fast > scaling.beta_slow > 0,
            f"{prefix}.beta_fast",
            scaling.beta_fast,
            f"must be above beta_slow={scaling.beta_slow}, and that above 0",
        )


def pattern_members(pattern: Pattern) -> tuple[LayerPattern, ...]:
    """The patterns of single layers."""
    return pattern.patterns if isinstance(pattern, PerLayer) else (pattern,)


def _validate_tasks(config: Config) -> None:
    names = [domain.name for domain in config.data.domains]
    for pattern in pattern_members(config.model.attention.pattern):
        for entry in pattern.tasks if isinstance(pattern, RuntimeWindowed) else ():
            require(
                entry.task in names,
                "model.attention.pattern.tasks",
                entry.task,
                f"a task is a domain in training; the domains are {', '.join(names)}",
            )


def _validate_trainable(config: Config) -> None:
    members = pattern_members(config.model.attention.pattern)
    warming = any(isinstance(member, Sparse) and member.stage == "warmup" for member in members)
    require(
        not warming or config.train.trainable == ("indexer",),
        "train.trainable",
        config.train.trainable,
        'must be ("indexer",) while a sparse pattern has stage=warmup: it trains the indexer alone',
    )


def _validate_model(model: ModelConfig) -> None:
    _require_positive(model, "model", "vocab_size", "dim", "num_layers", "dense_dim")
    _require_one_of(model, "model", "compute_dtype", DTYPES)
    _require_one_of(model, "model", "remat", REMAT_POLICIES)
    require(model.norm_epsilon > 0, "model.norm_epsilon", model.norm_epsilon, "must be positive")
    length = model.context_length
    require(length is None or length >= 1, "model.context_length", length, "must be at least 1, or none")
    require(model.init_std is None or model.init_std > 0, "model.init_std", model.init_std, "must be positive or none")
    require(
        0 <= model.num_dense_layers <= model.num_layers,
        "model.num_dense_layers",
        model.num_dense_layers,
        f"must be between 0 and model.num_layers={model.num_layers}",
    )
    attention, prefix = model.attention, "model.attention.projection"
    projection = attention.projection
    if isinstance(projection, GroupedQuery):
        _require_positive(projection, prefix, "num_heads", "num_kv_heads", "head_dim")
        require(
            projection.num_heads % projection.num_kv_heads == 0,
            f"{prefix}.num_heads",
            projection.num_heads,
            f"must be a multiple of num_kv_heads={projection.num_kv_heads}",
        )
        require(projection.head_dim % 2 == 0, f"{prefix}.head_dim", projection.head_dim, "must be even, for RoPE")
        rotated = projection.head_dim
    else:
        rotated = projection.rope_head_dim
        _require_positive(
            projection, prefix, "num_heads", "latent_dim", "nope_head_dim", "rope_head_dim", "value_head_dim"
        )
        require(
            projection.query_latent_dim is None or projection.query_latent_dim >= 1,
            f"{prefix}.query_latent_dim",
            projection.query_latent_dim,
            "must be at least 1, or none for queries without compression",
        )
        require(projection.rope_head_dim % 2 == 0, f"{prefix}.rope_head_dim", projection.rope_head_dim, "must be even")
    validate_pattern(attention.pattern, attention.causal)
    for pattern in pattern_members(attention.pattern):
        kernels = SPARSE_KERNELS if isinstance(pattern, Sparse) else WINDOWED_KERNELS
        require(
            attention.implementation in (None, *kernels),
            "model.attention.implementation",
            attention.implementation,
            f"must be none or one of {', '.join(kernels)} with the pattern {pattern.kind}",
        )
        require(
            not isinstance(pattern, Sparse) or pattern.index_dim >= rotated,
            "model.attention.pattern.index_dim",
            getattr(pattern, "index_dim", None),
            f"must be at least {rotated}, the rotated width of a head",
        )
    require(attention.rope_theta > 1, "model.attention.rope_theta", attention.rope_theta, "must be above 1")
    require(
        attention.softcap is None or attention.softcap > 0,
        "model.attention.softcap",
        attention.softcap,
        "must be positive or none",
    )
    _validate_scaling(attention.rope_scaling)
    if model.moe is None:
        require(
            model.num_dense_layers == model.num_layers,
            "model.num_dense_layers",
            model.num_dense_layers,
            f"must equal model.num_layers={model.num_layers} when model.moe is none",
        )
    else:
        _validate_moe(model.moe)


def _validate_moe(moe: MixtureOfExperts) -> None:
    router, prefix = moe.router, "model.moe.router"
    _require_positive(moe, "model.moe", "num_experts", "expert_dim")
    _require_positive(moe, "model.moe", "num_shared_experts", minimum=0)
    _require_positive(router, prefix, "top_k", "num_groups", "top_groups")
    _require_positive(router, prefix, "bias_update_rate", "balance_weight", minimum=0)
    require(
        moe.num_experts % router.num_groups == 0,
        "model.moe.num_experts",
        moe.num_experts,
        f"must be a multiple of router.num_groups={router.num_groups}",
    )
    group_size = moe.num_experts // router.num_groups
    require(
        router.top_groups <= router.num_groups,
        f"{prefix}.top_groups",
        router.top_groups,
        f"must be at most num_groups={router.num_groups}",
    )
    require(
        router.top_k <= router.top_groups * group_size,
        f"{prefix}.top_k",
        router.top_k,
        f"must be at most {router.top_groups * group_size}, the experts in the {router.top_groups} chosen group(s)"
        f" of {group_size}",
    )
    require(
        router.num_groups == 1 or group_size >= 2 or not isinstance(router, GroupedSigmoid),
        f"{prefix}.num_groups",
        router.num_groups,
        f"leaves {group_size} expert(s) a group; a group is scored by its two best, so use at most"
        f" {moe.num_experts // 2} groups",
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
    _require_positive(data, "data", "sequence_length", "max_segments")
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
    _require_positive(train, "train", "batch_size", "microbatches", "keep_checkpoints", "eval_rows", "log_every")
    _require_positive(train, "train", "num_steps", "checkpoint_every", "eval_every", minimum=0)
    require(
        train.batch_size % train.microbatches == 0,
        "train.batch_size",
        train.batch_size,
        f"must be a multiple of train.microbatches={train.microbatches}",
    )
    _require_positive(train.optimizer, "train.optimizer", "base_dim")
    require(
        train.optimizer.learning_rate > 0,
        "train.optimizer.learning_rate",
        train.optimizer.learning_rate,
        "must be positive",
    )
    schedule = train.schedule
    _require_positive(schedule, "train.schedule", "warmup_steps", minimum=0)
    spent = schedule.warmup_steps + (schedule.decay_steps if isinstance(schedule, WarmupStableDecay) else 0)
    require(
        0 <= spent <= schedule.total_steps,
        "train.schedule.total_steps",
        schedule.total_steps,
        f"must be at least the {spent} steps of warm-up and decay",
    )
    for name in ("first_moment_dtype", "second_moment_dtype"):
        _require_one_of(train.optimizer, "train.optimizer", name, DTYPES)
    require(train.optimizer.clip_norm > 0, "train.optimizer.clip_norm", train.optimizer.clip_norm, "must be positive")


def _validate_mesh(config: Config) -> None:
    mesh = config.mesh
    names = [axis.name for axis in dataclasses.fields(mesh)]
    _require_positive(mesh, "mesh", *names)
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
