"""Mixture of experts: router x experts x dispatch x combination."""

from dataclasses import dataclass, field
from typing import ClassVar

# Routers.


@dataclass
class GroupedSigmoid:
    """The published DeepSeek-V3 router (arXiv:2412.19437, section 2.1.2).

    Sigmoid scores; the best `top_groups` of `num_groups` groups by the sum of their two best biased scores; the best
    `top_k` experts of those groups by biased score; weights from the unbiased scores, normalised, times `route_scale`.
    `bias_update_rate` moves each selection bias towards balance after a step; `balance_weight` is the weight of the
    sequence-wise balance loss, `z_weight` that of the squared log-sum-exp of the logits (Zoph et al. 2022,
    arXiv:2202.08906).
    """

    top_k: int = 4
    num_groups: int = 4
    top_groups: int = 2
    route_scale: float = 2.5
    normalize_weights: bool = True
    bias_update_rate: float = 1e-3
    balance_weight: float = 1e-4
    z_weight: float = 0.0
    kind: ClassVar[str] = "grouped_sigmoid"


@dataclass
class Softmax:
    """Softmax scores; the best `top_k` experts of the best `top_groups` groups, a group scored by its best expert
    (DeepSeek-V2, arXiv:2405.04434, section 2.2; one group: Mixtral, Qwen3). The other fields as in `GroupedSigmoid`."""

    top_k: int = 2
    num_groups: int = 1
    top_groups: int = 1
    route_scale: float = 1.0
    normalize_weights: bool = True
    bias_update_rate: float = 0.0
    balance_weight: float = 1e-2
    z_weight: float = 0.0
    kind: ClassVar[str] = "softmax"


@dataclass
class ProbabilityMass:
    """Softmax scores; each token takes its best experts until their probabilities reach a mass, k_min to k_max of them.

    The mass is a state of each layer: it begins at `mass` and is moved after a step by `mass_update_rate` x (target_k
    - mean k), so that the mean number of experts a token stays at `target_k`; the gate decides which tokens get more
    (Huang et al. 2024, arXiv:2403.07652, with a fixed mass). What is held is the mean of training: with noise or
    dropout on the choice, evaluation has another. The other fields as in `GroupedSigmoid`.
    """

    k_min: int = 2
    k_max: int = 4
    target_k: float = 3.0
    mass: float = 0.5
    mass_update_rate: float = 0.02
    route_scale: float = 1.0
    normalize_weights: bool = True
    bias_update_rate: float = 0.0
    balance_weight: float = 1e-2
    z_weight: float = 0.0
    num_groups: ClassVar[int] = 1
    top_groups: ClassVar[int] = 1
    kind: ClassVar[str] = "probability_mass"

    @property
    def top_k(self) -> int:
        """The most experts a token can have: places in every array of assignments."""
        return self.k_max


Router = GroupedSigmoid | Softmax | ProbabilityMass


@dataclass
class Condition:
    """What the router knows of a token beside itself: its task (in training: its domain) or modality, or an embedding.

    Each of `tasks`, and any other one, has a learned embedding of width `dim`; callers of the model may give embeddings
    of their own. A learned matrix of each layer takes it to a shift of the router's logits.
    """

    tasks: tuple[str, ...] = ()
    dim: int = 16
    kind: ClassVar[str] = "condition"


# Experts.


@dataclass
class FeedForward:
    """An expert is a SwiGLU of `expert_dim` units. With `widths`, expert e has widths[e mod n] units, the widest
    `expert_dim`; all are stored and multiplied at the widest."""

    widths: tuple[int, ...] = ()
    kind: ClassVar[str] = "feed_forward"


@dataclass
class DeepExpert:
    """An expert is a stack of `num_layers` Transformer layers of its own, with SwiGLUs of `expert_dim` units, that
    attend causally among the tokens of a document routed to it."""

    num_layers: int = 2
    num_heads: int = 4
    head_dim: int = 32
    kind: ClassVar[str] = "deep"


Expert = FeedForward | DeepExpert


# Dispatch.

GROUPED_KERNELS = ("bucketed", "pallas_gpu", "pallas_tpu", "ragged_dot", "reference")


@dataclass
class DenseDispatch:
    """Every expert sees every token: the oracle. Costs num_experts / top_k times the work."""

    kind: ClassVar[str] = "dense"


@dataclass
class GroupedDispatch:
    """Sort tokens by expert, then one grouped matmul. Dropless. `implementation` is one of `GROUPED_KERNELS`, or None,
    which picks by platform."""

    implementation: str | None = None
    kind: ClassVar[str] = "grouped"


@dataclass
class CapacityDispatch:
    """An expert takes at most `factor` times its even share of a row's T x top_k places, the first assignments by
    position; the others are dropped, and counted in `router/dropped` (Lepikhin et al. 2020, arXiv:2006.16668).
    Documents packed in one row share its places, so that a later one may lose what it has alone. For training: a text
    that is being generated has no length to share out."""

    factor: float = 1.25
    kind: ClassVar[str] = "capacity"


Dispatch = DenseDispatch | GroupedDispatch | CapacityDispatch


# Combination.


@dataclass
class WeightedSum:
    """Σ weight x output."""

    kind: ClassVar[str] = "weighted_sum"


@dataclass
class CrossExpertAttention:
    """The outputs of a token's experts attend to one another before they are summed."""

    num_heads: int = 2
    head_dim: int = 32
    kind: ClassVar[str] = "cross_expert_attention"


Combination = WeightedSum | CrossExpertAttention


@dataclass
class MixtureOfExperts:
    """`num_experts` routed experts of width `expert_dim`, and `num_shared_experts` SwiGLUs that see every token.

    In training only: `router_noise` is the standard deviation of normal noise on the logits that choose (Shazeer et al.
    2017, arXiv:1701.06538); `expert_dropout` the probability that an expert is out of reach of a row, unless too few
    are left, in the chosen groups if there are groups (not the dropout inside experts of Switch Transformers).
    """

    num_experts: int = 16
    expert_dim: int = 128
    num_shared_experts: int = 1
    router: Router = field(default_factory=GroupedSigmoid)
    dispatch: Dispatch = field(default_factory=GroupedDispatch)
    expert: Expert = field(default_factory=FeedForward)
    combination: Combination = field(default_factory=WeightedSum)
    condition: Condition | None = None
    router_noise: float = 0.0
    expert_dropout: float = 0.0
