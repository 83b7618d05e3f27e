"""Models that cannot be built are refused here."""

from dsv3_jax.config.attention import (
    SPARSE_KERNELS,
    WINDOWED_KERNELS,
    Attention,
    GroupedQuery,
    LayerPattern,
    LearnedGlobal,
    Llama3Scaling,
    Pattern,
    PerLayer,
    RopeScaling,
    RuntimeWindowed,
    Segmented,
    Sparse,
    Windowed,
    Yarn,
    cudnn_refusal,
)
from dsv3_jax.config.checks import check_types, require, require_one_of, require_positive
from dsv3_jax.config.experts import (
    GROUPED_KERNELS,
    CapacityDispatch,
    CrossExpertAttention,
    DeepExpert,
    FeedForward,
    GroupedDispatch,
    GroupedSigmoid,
    MixtureOfExperts,
    ProbabilityMass,
)
from dsv3_jax.config.schema import DTYPES, REMAT_POLICIES, ModelConfig


def validate_model(model: ModelConfig) -> None:
    """Raises `ConfigError` for a model that cannot be built, whatever it is for."""
    check_types(model, "model.")
    check_model(model)


def validate_pattern(pattern: Pattern, causal: bool = True, prefix: str = "model.attention.pattern") -> None:
    """Raises `ConfigError` for a pattern with a value that cannot be."""
    match pattern:
        case Windowed():
            require_positive(pattern, prefix, "window")
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
            require_positive(pattern, prefix, "window")
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
            require_positive(pattern, prefix, "segment")
            require_one_of(pattern, prefix, "keys", ("segment", "all"))
        case LearnedGlobal():
            require_positive(pattern, prefix, "window", "top_k")
            _validate_stride(pattern, prefix)
        case Sparse():
            require_positive(pattern, prefix, "top_k", "index_heads", "index_dim")
            require_one_of(pattern, prefix, "stage", ("warmup", "sparse"))
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
        require_positive(scaling, prefix, "original_length")
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


def check_model(model: ModelConfig) -> None:
    """`validate_model` where the types have been checked."""
    require_positive(model, "model", "vocab_size", "dim", "num_layers", "dense_dim")
    require_one_of(model, "model", "compute_dtype", DTYPES)
    require_one_of(model, "model", "remat", REMAT_POLICIES)
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
    _validate_attention(model.attention)
    if model.moe is None:
        require(
            model.num_dense_layers == model.num_layers,
            "model.num_dense_layers",
            model.num_dense_layers,
            f"must equal model.num_layers={model.num_layers} when model.moe is none",
        )
    else:
        _validate_moe(model.moe)
        require(
            model.attention.causal or not isinstance(model.moe.expert, DeepExpert),
            "model.moe.expert",
            model.moe.expert.kind,
            "needs model.attention.causal=true: deep experts attend to earlier tokens only",
        )
    _validate_extras(model)


def _validate_attention(attention: Attention) -> None:
    """Projection, pattern, kernel, and what goes with any of them."""
    prefix = "model.attention.projection"
    projection = attention.projection
    if isinstance(projection, GroupedQuery):
        require_positive(projection, prefix, "num_heads", "num_kv_heads", "head_dim")
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
        require_positive(
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
        if attention.implementation == "cudnn":
            reason = cudnn_refusal(pattern, attention.causal, attention.softcap, attention.sinks)
            require(reason is None, "model.attention.implementation", "cudnn", f"{reason}; use another one, or none")
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


def _validate_extras(model: ModelConfig) -> None:
    """Multi-token prediction and the unit gate."""
    mtp, gate = model.mtp, model.unit_gate
    if mtp is not None:
        require_positive(mtp, "model.mtp", "depth")
        require_positive(mtp, "model.mtp", "weight", "late_weight", minimum=0)
        require(
            mtp.late_step is None or mtp.late_step >= 0,
            "model.mtp.late_step",
            mtp.late_step,
            "must be at least 0, or none",
        )
        require(
            model.attention.causal,
            "model.mtp",
            mtp,
            "needs model.attention.causal=true: later tokens are not there to be predicted otherwise",
        )
    if gate is None:
        return
    require_positive(gate, "model.unit_gate", "blocks", "gate_dim")
    require(
        gate.budget_weight > 0,
        "model.unit_gate.budget_weight",
        gate.budget_weight,
        "must be positive: nothing else holds target",
    )
    require(0 < gate.target < 1, "model.unit_gate.target", gate.target, "must be between 0 and 1")
    require(gate.temperature > 0, "model.unit_gate.temperature", gate.temperature, "must be positive")
    widths = {"model.dense_dim": model.dense_dim} if model.num_dense_layers else {}
    moe = model.moe
    if moe is not None and moe.num_shared_experts:
        widths["model.moe.num_shared_experts x expert_dim"] = moe.num_shared_experts * moe.expert_dim
    require(
        bool(widths),
        "model.unit_gate",
        gate,
        "has nothing to gate: it acts on dense MLPs (model.num_dense_layers) and shared experts"
        " (model.moe.num_shared_experts)",
    )
    for name, width in widths.items():
        require(
            width % gate.blocks == 0, "model.unit_gate.blocks", gate.blocks, f"must divide the {width} units of {name}"
        )


def _validate_moe(moe: MixtureOfExperts) -> None:
    prefix = "model.moe"
    require_positive(moe, prefix, "num_experts", "expert_dim")
    require_positive(moe, prefix, "num_shared_experts", "router_noise", minimum=0)
    require(0 <= moe.expert_dropout < 1, f"{prefix}.expert_dropout", moe.expert_dropout, "must be at least 0, below 1")
    _validate_router(moe)
    match moe.expert:
        case FeedForward(widths):
            require(
                min(widths, default=1) >= 1
                and max(widths, default=moe.expert_dim) == moe.expert_dim
                and len(widths) <= moe.num_experts,
                f"{prefix}.expert.widths",
                widths,
                f"must be at most {moe.num_experts} widths, the widest of model.moe.expert_dim={moe.expert_dim}",
            )
        case DeepExpert() as deep:
            require_positive(deep, f"{prefix}.expert", "num_layers", "num_heads", "head_dim")
            require(deep.head_dim % 2 == 0, f"{prefix}.expert.head_dim", deep.head_dim, "must be even, for RoPE")
    if isinstance(moe.dispatch, GroupedDispatch):
        name = moe.dispatch.implementation
        require(
            name in (None, *GROUPED_KERNELS),
            f"{prefix}.dispatch.implementation",
            name,
            f"must be none or one of {', '.join(GROUPED_KERNELS)}",
        )
    if isinstance(moe.dispatch, CapacityDispatch):
        factor = moe.dispatch.factor
        require(factor > 0, f"{prefix}.dispatch.factor", factor, "must be above 0; 1 is an even share")
    if isinstance(moe.combination, CrossExpertAttention):
        require_positive(moe.combination, f"{prefix}.combination", "num_heads", "head_dim")
        require(
            moe.router.top_k >= 2,
            f"{prefix}.combination",
            moe.combination.kind,
            f"needs {prefix}.router.top_k of at least 2: one expert has none to attend to",
        )
    if moe.condition is not None:
        require_positive(moe.condition, f"{prefix}.condition", "dim")
        tasks = moe.condition.tasks
        require(len(set(tasks)) == len(tasks), f"{prefix}.condition.tasks", tasks, "must name each task once")


def _validate_router(moe: MixtureOfExperts) -> None:
    router, prefix = moe.router, "model.moe.router"
    require_positive(router, prefix, "bias_update_rate", "balance_weight", "z_weight", minimum=0)
    if isinstance(router, ProbabilityMass):
        require(
            router.mass_update_rate > 0,
            f"{prefix}.mass_update_rate",
            router.mass_update_rate,
            "must be positive: nothing else holds target_k",
        )
        require(
            1 <= router.k_min <= router.k_max <= moe.num_experts,
            f"{prefix}.k_min",
            router.k_min,
            f"must be between 1 and k_max={router.k_max}, and that at most model.moe.num_experts={moe.num_experts}",
        )
        require(
            router.k_min <= router.target_k <= router.k_max,
            f"{prefix}.target_k",
            router.target_k,
            f"must be between k_min={router.k_min} and k_max={router.k_max}",
        )
        require(0 <= router.mass <= 1, f"{prefix}.mass", router.mass, "must be between 0 and 1")
        return
    require_positive(router, prefix, "top_k", "num_groups", "top_groups")
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
