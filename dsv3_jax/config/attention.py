"""Attention: projection x pattern."""

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass
class Full:
    """Every query sees every key of its document."""

    kind: ClassVar[str] = "full"


@dataclass
class Windowed:
    """Windows of `window` positions begin at every multiple of `stride`; a query sees the keys it shares a window with.

    stride=1 is the sliding window (query p sees keys p - window + 1 ... p), stride=window/2 overlapping windows,
    stride=window disjoint ones. Beside them every query sees the keys at `global_positions` of its own document
    (absolute; under causality only later queries see them) and at `global_fractions` of its length (0 the first token,
    0.5 the middle, 1 the last; refused under causality, where the length is not known yet).
    """

    window: int = 256
    global_positions: tuple[int, ...] = ()
    stride: int = 1
    global_fractions: tuple[float, ...] = ()
    kind: ClassVar[str] = "windowed"


@dataclass
class TaskWindow:
    """The window of a task; `task` is the name of a domain in training, and of `--task` in generation."""

    task: str = ""
    window: int = 256


@dataclass
class RuntimeWindowed:
    """A sliding window whose size is an array, one value a token, of at most `window`: no recompilation to change it.

    `tasks` names the window of each task; a task that is not named has `window`.
    """

    window: int = 4096
    global_positions: tuple[int, ...] = ()
    tasks: tuple[TaskWindow, ...] = ()
    kind: ClassVar[str] = "runtime_windowed"


@dataclass
class Segmented:
    """Positions are cut into segments. keys="segment": a query sees the keys of its own segment. keys="all": queries
    are computed a segment at a time over all keys; the result is that of `Full`, the memory that of one segment."""

    segment: int = 256
    keys: str = "segment"
    kind: ClassVar[str] = "segmented"


@dataclass
class LearnedGlobal:
    """Local windows (see `Windowed`) and the `top_k` tokens that a learned gate scores best.

    A query sees the best tokens of the blocks of `window` positions before its own. The log-sigmoid of the gate is
    added to their attention scores, so that the gate is trained by what it lets through.
    """

    window: int = 64
    stride: int = 64
    top_k: int = 16
    kind: ClassVar[str] = "learned_global"


@dataclass
class Sparse:
    """DeepSeek sparse attention (DeepSeek-V3.2, section 2): an indexer picks `top_k` keys for each query.

    stage="warmup": attention stays dense and the indexer learns to predict it; "sparse": only the picked keys are seen.
    The indexer learns from a loss of its own, of weight `loss_weight`, and from no other.
    """

    top_k: int = 2048
    index_heads: int = 64
    index_dim: int = 128
    stage: str = "sparse"
    loss_weight: float = 1.0
    kind: ClassVar[str] = "sparse"


LayerPattern = Full | Windowed | RuntimeWindowed | Segmented | LearnedGlobal | Sparse


@dataclass
class PerLayer:
    """Layer i has pattern i mod n of the n given ones."""

    patterns: tuple[LayerPattern, ...] = field(default_factory=lambda: (Windowed(), Windowed(), Full()))
    kind: ClassVar[str] = "per_layer"


Pattern = LayerPattern | PerLayer


@dataclass
class GroupedQuery:
    """Grouped-query attention (Ainslie et al. 2023): `num_kv_heads` keys and values shared by `num_heads` queries.

    `qk_norm` normalises each query and key head before rotation (Qwen3).
    """

    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 64
    qk_norm: bool = False
    kind: ClassVar[str] = "grouped_query"


@dataclass
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    `query_latent_dim=None` projects queries directly, without compression.
    """

    num_heads: int = 4
    query_latent_dim: int | None = 128
    latent_dim: int = 64
    nope_head_dim: int = 32
    rope_head_dim: int = 32
    value_head_dim: int = 64
    kind: ClassVar[str] = "latent"


Projection = GroupedQuery | Latent


@dataclass
class LinearScaling:
    """Positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float = 4.0
    kind: ClassVar[str] = "linear"


@dataclass
class Yarn:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): slow rotations are interpolated by `factor`, fast ones kept.

    With m(s) = 0.1 s ln(factor) + 1, rotations are scaled by m(mscale) / m(mscale_all_dim) and the softmax scale by
    m(mscale_all_dim)^2, as DeepSeek-V2 and V3 do; mscale=1, mscale_all_dim=0 is the rule of the paper.
    """

    factor: float = 40.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    kind: ClassVar[str] = "yarn"


@dataclass
class Llama3Scaling:
    """Llama 3.1's rule: wavelengths above original_length / low_factor are interpolated by `factor`, those below
    original_length / high_factor kept, those between blended."""

    factor: float = 8.0
    original_length: int = 8192
    low_factor: float = 1.0
    high_factor: float = 4.0
    kind: ClassVar[str] = "llama3"


RopeScaling = LinearScaling | Yarn | Llama3Scaling


WINDOWED_KERNELS = ("blocked", "cudnn", "pallas_gpu", "pallas_tpu", "reference")
SPARSE_KERNELS = ("chunked", "reference")


def cudnn_refusal(pattern: LayerPattern, causal: bool, softcap: float | None, sinks: bool = False) -> str | None:
    """Why cuDNN's attention cannot be this, whatever the arrays; None if it can."""
    slides = isinstance(pattern, Windowed) and pattern == Windowed(pattern.window) and causal
    if not slides and not isinstance(pattern, Full):
        return "it knows the pattern full and, under causality, sliding windows without global tokens"
    if sinks:
        return "it gives no gradient through the log-sum-exp, which sinks need"
    return None if softcap is None else "it has no soft-cap"


@dataclass
class Attention:
    """Projection, pattern, and what any of them can be combined with.

    `causal=False` lets queries see later keys too (encoders). `sinks` gives each head a learned score that takes part
    in the softmax and has no value (gpt-oss). `softcap` bounds scores: c tanh(s / c) (Gemma 2). `implementation` names
    a kernel of `kernels/windowed_attention` or `kernels/sparse_attention`; None picks the fastest that applies.
    """

    projection: Projection = field(default_factory=Latent)
    pattern: Pattern = field(default_factory=Full)
    causal: bool = True
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    sinks: bool = False
    softcap: float | None = None
    implementation: str | None = None
