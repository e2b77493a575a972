"""Every setting of a run, and every default, in one place.

A run is described by one `RunConfig`. YAML files and the command line are parsed in `pipelines/cli.py`; this module
only knows plain dictionaries, so that `yan_core` stays free of a command-line library and a config can be pickled to a
worker.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class UnknownName(ValueError):
    """A setting that there is not."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How text becomes token ids."""

    kind: Literal["word", "bpe"] = "word"
    """`word`: one token a word, for small closed vocabularies. `bpe`: byte-level byte-pair encoding, for real text."""
    vocab_size: int = 4096
    """Upper bound on the vocabulary, special tokens included."""
    lowercase: bool = False
    """Lower-case the text first; the case is then lost in answers too, and does not count when they are scored."""
    sample_rows: int = 50_000
    """Rows read to train the vocabulary, of each data set and there as many of each file or part of one."""
    path: str = ""
    """Model folder whose tokenizer is taken in place of one trained here; the settings above say nothing then."""

    def __post_init__(self) -> None:
        least = 260 if self.kind == "bpe" else 8
        enough = self.vocab_size >= least
        _require(enough, f"vocab_size must be >= {least} for kind={self.kind}, got {self.vocab_size}")
        _require(self.sample_rows >= 1, f"sample_rows must be >= 1, got {self.sample_rows}")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A token encoder: embedding, positions, bidirectional blocks (METHOD: arXiv:2604.15009, stage 1)."""

    num_blocks: int = 2
    """Bidirectional blocks of model.mixer."""
    conv_kernel: int = 0
    """Width of a short depthwise convolution before each block; 0 = none. It lets a small source encoder bind the words
    of one statement, if half of it spans the statement: on bAbI 13 left the plateau after 300 steps, 7 after 700
    (EXPERIMENTS, 2026-11-23)."""
    embed_std: float = 0.02
    """Standard deviation of the initial token embeddings; 0.5 suits a vocabulary of tens of words."""
    position_std: float = 0.02
    """Standard deviation of the initial learned positions; as large as embed_std they would drown the words."""
    matching_gain: float = 0.0
    """Above 0, attention starts with keys equal to queries, this many times larger than otherwise: a name in the
    question then finds the same name in the statements from the first step (EXPERIMENTS, 2026-11-23)."""
    positions: tuple[str, ...] = ("rotary", "start")
    """Any of `rotary` (in the attention; a Mamba mixer has none), `start` (learned, from the first token) and `end`
    (learned, from the last)."""

    def __post_init__(self) -> None:
        allowed = ("rotary", "start", "end")
        wrong = [p for p in self.positions if p not in allowed]
        _require(not wrong, f"positions must be from {allowed}, got {wrong}")
        odd = self.conv_kernel == 0 or self.conv_kernel % 2 == 1
        _require(odd, f"conv_kernel must be 0 or odd, got {self.conv_kernel}")
        _require(self.num_blocks >= 1, f"num_blocks must be >= 1, got {self.num_blocks}")
        _require(self.embed_std > 0, f"embed_std must be > 0, got {self.embed_std}")
        _require(self.matching_gain >= 0, f"matching_gain must be >= 0, got {self.matching_gain}")
        _require(self.position_std >= 0, f"position_std must be >= 0, got {self.position_std}")


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """A bidirectional selective state space layer (Gu and Dao 2023, arXiv:2312.00752)."""

    d_state: int = 16
    """State size of each channel."""
    conv_kernel: int = 4
    """Width of the causal convolution before the scan."""
    expand: int = 2
    """Inner width, as a multiple of d_model."""

    def __post_init__(self) -> None:
        for name in ("d_state", "conv_kernel", "expand"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be >= 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of the autoencoder and of the mixture-of-experts flow (arXiv:2604.15009)."""

    d_model: int = 128
    """Width of every layer."""
    latent_dim: int = 0
    """Width of the latents x_0, x_1 between target encoder, flow and decoder; 0: d_model."""
    mixer: Literal["attention", "mamba"] = "attention"
    """What lets tokens see each other in the encoders and the flow; cross-attention to the source stays attention."""
    mamba: MambaConfig = field(default_factory=MambaConfig)
    """Layer of `mixer: mamba`."""
    num_heads: int = 4
    """Attention heads."""
    ffn_multiple: int = 4
    """Hidden width of a feed-forward layer, as a multiple of d_model."""
    dropout: float = 0.0
    """Dropout after each sub-layer of the encoders and of the flow, in training only."""
    max_positions: int = 512
    """Longest source or target, in tokens."""
    target_encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Turns the clean target into x_1."""
    source_encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(positions=("rotary", "start", "end")))
    """Reads the source. A fresh encoder that trains with the flow while the target encoder, which defines x_1, stays
    frozen, beat a shared one (EXPERIMENTS, 2026-11-23)."""
    share_encoder: bool = False
    """Use the target encoder for the source too, as the paper does; `source_encoder` is then not built."""
    decoder_blocks: int = 2
    """Residual feed-forward blocks of the token-wise decoder."""
    flow_blocks: int = 2
    """Blocks of the flow trunk."""
    cross_attention_every: int = 1
    """Cross-attention to the source in every n-th flow block."""
    num_experts: int = 4
    """Expert velocity heads K; 1 is plain flow matching."""
    top_k: int = 0
    """Experts computed in a training step for each scope, drawn by the gate; 0: all of them, the paper's dense mixture.
    At inference one is computed either way."""
    prediction: Literal["velocity", "endpoint"] = "velocity"
    """What an expert's head gives: u_t, or x_1, from which the velocity follows. The likelihood is of the same."""
    self_conditioning: bool = False
    """The trunk also reads the estimate of x_1 of the pass before (Chen et al. 2022, arXiv:2208.04202)."""
    length: Literal["fill", "predicted"] = "fill"
    """How long an answer is: `fill` writes end-of-text tokens up to the longest target and cuts at the first one;
    `predicted` writes as many tokens as a head on the source says."""
    expert_scope: Literal["token", "segment", "sequence"] = "sequence"
    """What one draw of an expert covers. The paper draws by token; tokens that draw alone mix two right answers into a
    wrong one (EXPERIMENTS, 2026-11-23)."""
    segment_length: int = 16
    """Tokens of a segment where expert_scope is `segment`."""
    gate_temperature: float = 1.0
    """Divides the gate's logits."""
    init_noise: float = 1.0
    """Standard deviation of the source noise x_0."""

    def __post_init__(self) -> None:
        _require(
            self.num_heads >= 1 and self.d_model >= 1 and self.d_model % (2 * self.num_heads) == 0,
            f"d_model={self.d_model} must be a multiple of 2 * num_heads={2 * self.num_heads} "
            "(rotary positions need an even head width)",
        )
        counts = ("decoder_blocks", "flow_blocks", "cross_attention_every", "num_experts", "segment_length")
        for name in (*counts, "ffn_multiple", "max_positions"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be >= 1, got {value}")
        _require(
            0 <= self.top_k <= self.num_experts,
            f"top_k must be in [0, num_experts={self.num_experts}], got {self.top_k}",
        )
        _require(
            self.top_k != 1 or self.num_experts == 1,
            "top_k must be 0 or >= 2: beside one expert alone the gate has nothing to learn from",
        )
        _require(
            self.mixer == "attention" or not (self.source_encoder.matching_gain or self.target_encoder.matching_gain),
            "*_encoder.matching_gain is for attention and must be 0 with mixer=mamba",
        )
        _require(
            self.latent_dim >= 0 and self.latent_dim != 1,
            f"latent_dim must be 0 or >= 2 (latents are normalised), got {self.latent_dim}",
        )
        _require(
            not (self.share_encoder and self.latent_dim),
            "latent_dim must be 0 with share_encoder, whose latents the flow reads as a source too",
        )
        _require(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")
        _require(self.gate_temperature > 0, f"gate_temperature must be > 0, got {self.gate_temperature}")
        _require(self.init_noise > 0, f"init_noise must be > 0, got {self.init_noise}")

    @property
    def latent_width(self) -> int:
        """Width of x_0 and x_1."""
        return self.latent_dim or self.d_model


Family = Literal["ar", "encoder_decoder", "masked_diffusion"]
"""What YAN is measured against: an autoregressive decoder (GPT-2), an autoregressive encoder-decoder (BART), and masked
diffusion (LLaDA, MDLM)."""


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Architecture of a model that YAN is measured against: Transformer blocks, feed-forward layers 4 d_model wide."""

    family: Family = "ar"
    """Which of them."""
    d_model: int = 128
    """Width of every layer."""
    num_blocks: int = 4
    """Blocks; of an encoder-decoder so many in each half."""
    num_heads: int = 2
    """Attention heads."""
    dropout: float = 0.0
    """Dropout of embeddings and after each sub-layer, in training only."""
    max_positions: int = 512
    """Longest source and target together, in tokens."""

    def __post_init__(self) -> None:
        for name in ("d_model", "num_blocks", "num_heads", "max_positions"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be >= 1, got {value}")
        _require(
            self.d_model % (2 * self.num_heads) == 0,
            f"d_model={self.d_model} must be a multiple of 2 * num_heads={2 * self.num_heads}",
        )
        _require(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def num_parameters(self) -> int:
        """Weights of the blocks: embeddings, vocabulary head, biases and norms left out."""
        # Attention has 4, feed-forward 8; of BART's two blocks the decoder's has attention twice.
        a_block = 28 if self.family == "encoder_decoder" else 12
        return a_block * self.num_blocks * self.d_model**2

    @property
    def learns_filling(self) -> bool:
        """Whether it writes, and learns, the end-of-text tokens after the first one too."""
        return self.family == "masked_diffusion"

    @staticmethod
    def of_size(num_parameters: int, family: Family = "ar", least_blocks: int = 1, **settings: Any) -> BaselineConfig:
        """The shape within 5 % of so many parameters whose width is nearest to 64 times its depth, as in GPT-2 small.

        Heads are 64 wide; below five million the width is a multiple of 8 and heads are at least 64 wide or one.

        Args:
            num_parameters: See `num_parameters`.
            family: Which baseline.
            least_blocks: Depth that even a tiny model has.
            settings: Other fields.
        """
        step = 64 if num_parameters >= 5e6 else 8  # between steps of 64 a small model would be deep and narrow

        def nearest(blocks: int) -> BaselineConfig:
            one = BaselineConfig(family=family, d_model=8, num_blocks=blocks, num_heads=1).num_parameters / 64
            width = max(step, step * round(math.sqrt(num_parameters / one) / step))
            heads = max(n for n in range(1, max(1, width // 64) + 1) if width % (2 * n) == 0)
            return BaselineConfig(family=family, d_model=width, num_blocks=blocks, num_heads=heads, **settings)

        shapes = [nearest(blocks) for blocks in range(least_blocks, 65)]
        error = {shape: abs(shape.num_parameters / num_parameters - 1) for shape in shapes}
        close = [shape for shape in shapes if error[shape] <= max(0.05, min(error.values()))]
        return min(close, key=lambda shape: abs(math.log(shape.d_model / (64 * shape.num_blocks))))


@dataclass(frozen=True, kw_only=True)
class AutoencoderLossConfig:
    """Stage 1: denoising autoencoder (arXiv:2604.15009, stage 1)."""

    latent_noise: float = 0.5
    """Each sequence's latents get noise of a standard deviation drawn from U(0, latent_noise), in training only."""
    clean_share: float = 0.3
    """Share of rows that are not corrupted; at inference the target encoder sees clean text only."""
    mask_share: float = 0.12
    """Share of tokens put under span masks in a corrupted row."""
    max_span: int = 3
    """Longest masked span, in tokens."""
    weight_l2: float = 1e-4
    """Weight of the mean squared latent; a norm ends the encoder, so that it is 1 already, but for rounding."""
    weight_mmd: float = 0.1
    """Weight of the maximum mean discrepancy between latents and N(0, I)."""
    mmd_tokens: int = 256
    """Most token vectors used for the discrepancy in a step (the paper: 2,000); its cost grows with their square."""

    def __post_init__(self) -> None:
        for name in ("clean_share", "mask_share"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name} must be in [0, 1], got {value}")
        for name in ("latent_noise", "weight_l2", "weight_mmd"):
            value = getattr(self, name)
            _require(value >= 0, f"{name} must be >= 0, got {value}")
        _require(self.max_span >= 1, f"max_span must be >= 1, got {self.max_span}")
        _require(self.mmd_tokens >= 2, f"mmd_tokens must be >= 2, got {self.mmd_tokens}")


@dataclass(frozen=True, kw_only=True)
class FlowLossConfig:
    """Stages 2 and 3: mixture-of-experts flow matching and the losses through the solver (arXiv:2604.15009)."""

    sigma: float = 1.0
    """Standard deviation of a component of what an expert predicts (model.prediction) around it; large values give
    plain flow matching."""
    likelihood: Literal["joint", "marginal"] = "joint"
    """`joint` ties one expert to the path at t = 0 and at t; `marginal` is the paper's, at t alone."""
    expert_draw: Literal["posterior", "prior"] = "posterior"
    """Which distribution the solver's expert is drawn from in training; the paper draws from the gate's prior."""
    even_experts: bool = False
    """Whether each expert learns from about as many scopes of a batch as every other (of each part, where
    scaling.accumulation cuts it; scopes of filling aside). For tasks with several right answers, where the posterior
    may give nearly all rows to one expert; `weight_balance` moves the gate alone. Wants expert_draw `posterior` and
    model.top_k 0."""
    solver_steps: tuple[int, ...] = (1, 1, 2, 2, 3, 3, 4, 8)
    """The number of Euler steps of the training solver is drawn from these, anew for each batch; what is named twice is
    drawn twice as often. Earlier code trained at a fixed number failed at every other one, which was not seen again
    with today's recipe; without the 8 a model may fall at eight steps (EXPERIMENTS, 2026-11-23)."""
    time_alpha: float = 1.0
    """t ~ Beta(time_alpha, time_beta)."""
    time_beta: float = 1.0
    """See time_alpha."""
    weight_flow: float = 1.0
    """Weight of the mixture's negative log-likelihood, divided by the latents' width and by a row's tokens."""
    weight_end: float = 1.0
    """Weight of the mean squared error of the solver's endpoint."""
    weight_ce: float = 1.0
    """Weight of the cross-entropy of the decoded endpoint."""
    weight_gate: float = 1.0
    """Weight of the gate's cross-entropy to the experts' responsibilities, in nats a scope. The likelihood has the same
    gradient but divided by width and tokens, too weak to learn from: the posterior draw then tells the solver what the
    gate should have read from the source, and nothing makes the model read it (EXPERIMENTS, 2026-11-23)."""
    weight_balance: float = 0.01
    """Weight of KL(mean gate || uniform) at t = 0."""
    weight_entropy: float = 0.0
    """Weight of the entropy bonus of the gate at t = 0."""
    fill_weight: float = 0.1
    """Weight of the end-of-text tokens after the first one, which fill a short target up and are never shown."""
    source_mask_share: float = 0.0
    """Share of source tokens replaced by the mask token in fine-tuning, a regulariser for small data."""
    source_drop_share: float = 0.0
    """Share of rows that lose their whole source in stages 2 and 3, which classifier-free guidance needs (0.1 is
    usual)."""
    weight_length: float = 0.1
    """Weight of the length head's cross-entropy, where model.length is `predicted`."""
    weight_l2: float = 0.0
    """Weight of the mean squared x_1, for stages that train the target encoder too."""
    weight_mmd: float = 0.0
    """Weight of the maximum mean discrepancy between x_1 and N(0, I), for the same stages."""
    mmd_tokens: int = 256
    """Most token vectors used for the discrepancy in a step."""
    corpus_mask_share: float = 0.12
    """Stage 2 on plain text: share of tokens under span masks in the source."""
    corpus_max_span: int = 3
    """Stage 2 on plain text: longest masked span."""

    def __post_init__(self) -> None:
        for name in ("flow", "end", "ce", "gate", "balance", "entropy", "length", "l2", "mmd"):
            value = getattr(self, f"weight_{name}")
            _require(value >= 0 and math.isfinite(value), f"weight_{name} must be finite, >= 0, got {value}")
        _require(
            not self.even_experts or self.expert_draw == "posterior",
            "even_experts wants expert_draw posterior: the gate's prior knows nothing of evenness",
        )
        _require(self.corpus_max_span >= 1, f"corpus_max_span must be >= 1, got {self.corpus_max_span}")
        _require(self.sigma > 0, f"sigma must be > 0, got {self.sigma}")
        steps = self.solver_steps
        _require(min(steps, default=0) >= 1, f"solver_steps must name step counts >= 1, got {steps}")
        for name in ("time_alpha", "time_beta"):
            value = getattr(self, name)
            _require(value > 0, f"{name} must be > 0, got {value}")
        _require(self.mmd_tokens >= 2, f"mmd_tokens must be >= 2, got {self.mmd_tokens}")
        for name in ("fill_weight", "source_mask_share", "source_drop_share", "corpus_mask_share"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name} must be in [0, 1], got {value}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 100
    """Linear warm-up, in optimizer steps."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up; `linear` and `cosine` end at 2 % of the peak."""
    weight_decay: float = 0.01
    """On matrices only; never on biases, norms and embeddings."""
    beta2: float = 0.98
    """AdamW's second beta (the first is 0.9)."""
    clip_norm: float = 1.0
    """Gradient norm above which gradients are scaled down."""
    max_skipped: int = 10
    """Steps in a row that are left out because their gradient is not finite, before training gives up."""
    ema_decay: float = 0.0
    """Above 0, a stage leaves the exponential moving average of its weights, with this decay a step, and not the last
    ones. Early on the decay is smaller, (1 + step) / (10 + step), so that the fresh weights are soon forgotten."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"lr must be > 0, got {self.lr}")
        _require(self.weight_decay >= 0, f"weight_decay must be >= 0, got {self.weight_decay}")
        _require(self.clip_norm > 0, f"clip_norm must be > 0, got {self.clip_norm}")
        _require(self.warmup_steps >= 0, f"warmup_steps must be >= 0, got {self.warmup_steps}")
        _require(0 < self.beta2 < 1, f"beta2 must be in (0, 1), got {self.beta2}")
        _require(self.max_skipped >= 0, f"max_skipped must be >= 0, got {self.max_skipped}")
        _require(0 <= self.ema_decay < 1, f"ema_decay must be in [0, 1), got {self.ema_decay}")


Part = Literal["target_encoder", "decoder", "source_encoder", "flow"]
"""A part of the model that a stage can train."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of training. `max_steps` 0 leaves the stage out."""

    max_steps: int = 500
    """Optimizer steps."""
    batch_size: int = 64
    """Rows of a step over all workers; best a multiple of data.lanes, of which a worker takes one at least."""
    trains: tuple[Part, ...] = ("source_encoder", "flow")
    """Parts that learn; the others are frozen."""
    curriculum_steps: int = 0
    """Steps over which rows grow from the shortest eighth of what is read to all of it; 0: all lengths from the start.
    What it did on the built-in world is in EXPERIMENTS, 2026-11-23."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of this stage."""

    def __post_init__(self) -> None:
        _require(self.max_steps >= 0, f"max_steps must be >= 0, got {self.max_steps}")
        _require(self.curriculum_steps >= 0, f"curriculum_steps must be >= 0, got {self.curriculum_steps}")
        _require(self.batch_size >= 1, f"batch_size must be >= 1, got {self.batch_size}")
        _require(len(self.trains) > 0, "trains must name at least one part of the model, got none")


@dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """The three stages of arXiv:2604.15009, in order."""

    autoencoder: StageConfig = field(default_factory=lambda: StageConfig(trains=("target_encoder", "decoder")))
    """Stage 1: target encoder and decoder, on the corpus and on the task's targets."""
    flow: StageConfig = field(default_factory=StageConfig)
    """Stage 2: the flow on the corpus, filling masked spans."""
    finetune: StageConfig = field(default_factory=StageConfig)
    """Stage 3: the flow on the task's (source, target) pairs."""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """A named data set: where its rows are and which columns mean what."""

    format: Literal["world", "world_stories", "parquet", "jsonl", "csv", "text", "huggingface"] = "parquet"
    """`world` and `world_stories` are the built-in simulator's questions and plain stories; `text` gives one row a
    line, in the column `text`."""
    path: str = ""
    """Hugging Face: the data set's name or a local folder of it."""
    config_name: str | None = None
    """Hugging Face: the data set's configuration."""
    train: str = ""
    """File, folder or glob of the training rows, below data.root or with a scheme (s3://, gs://). Hugging Face: the
    split."""
    validation: str = ""
    """The same for validation rows."""
    held_out: float = 0.0
    """Share of the training rows that becomes the validation split, and as much again a test split, where `validation`
    is empty. Which split a row falls into follows from its document, see `document`."""
    document: str = ""
    """Column that says which document or passage a row belongs to, `a.b` as in `columns`; empty: the text that the task
    reads (of a question, its context). Rows of one document fall into one split, and training rows whose document is
    among the validation rows are dropped."""
    columns: dict[str, str] = field(default_factory=dict)
    """Template field -> column, where the names differ. `a.b` is what column `a` holds under `b`; of a list, all of
    them."""
    where: dict[str, str] = field(default_factory=dict)
    """Row filter: column -> the value it must have. The other rows are not part of the data set."""
    num_train: int = 20_000
    """World: how many training examples (and stories) to draw."""
    num_validation: int = 1_000
    """World: how many validation examples."""
    kinds: tuple[str, ...] = ()
    """World: kinds of question; none named = all but `someone` and `event`, which several sentences answer, and `log`,
    whose answer is long."""
    max_events: int = 10
    """World: most sentences of a story, of two at the least."""

    def __post_init__(self) -> None:
        for name in ("num_train", "num_validation"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be >= 1, got {value}")
        _require(not (self.held_out and self.validation), "held_out and validation exclude each other")
        _require(0 <= self.held_out < 0.5, f"held_out must be in [0, 0.5), got {self.held_out}")


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """What is done to texts before they are tokenised."""

    unicode: Literal["", "NFC", "NFKC"] = "NFC"
    """Unicode normal form, of the corpus and of the fields of the task's rows; control characters are taken out with
    it. Empty: texts stay as they are."""
    min_chars: int = 1
    """Shorter texts of the corpus are dropped."""
    max_chars: int = 0
    """Longer texts of the corpus are dropped; 0: none."""
    duplicates: Literal["keep", "exact", "near"] = "keep"
    """`exact`: of equal texts of the corpus, white space and case apart, the first stays, and of training rows of the
    task with the same source and target, white space apart. `near`: of texts of the corpus that share most of their
    word 5-grams too."""
    near_threshold: float = 0.8
    """Share of 5-grams (Jaccard similarity) from which two texts count as near-duplicates, where duplicates=near."""

    def __post_init__(self) -> None:
        _require(self.min_chars >= 0, f"min_chars must be >= 0, got {self.min_chars}")
        _require(self.max_chars >= 0, f"max_chars must be >= 0, got {self.max_chars}")
        _require(0 < self.near_threshold < 1, f"near_threshold must be in (0, 1), got {self.near_threshold}")
        _require(
            self.duplicates == "near" or self.near_threshold == 0.8,
            f"near_threshold={self.near_threshold} is for duplicates=near, got {self.duplicates!r}",
        )


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """One data set of a mixture."""

    epochs: float = 1.0
    """How often an epoch of the mixture reads it; 0.5: half of it, another half in the next epoch."""
    share: float = 0.0
    """Share of the mixture's rows, in place of `epochs`; given for all data sets of the mixture or for none. The one
    that would have to be repeated least is then read once an epoch."""

    def __post_init__(self) -> None:
        _require(self.epochs > 0, f"epochs must be > 0, got {self.epochs}")
        _require(0 <= self.share <= 1, f"share must be in [0, 1], got {self.share}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows, as which task, in which lengths."""

    root: str = "."
    """Folder or URL that relative paths of data sets start from."""
    datasets: dict[str, DatasetConfig] = field(default_factory=dict)
    """Data sets by name, beside the built-in `world`."""
    dataset: str = "world"
    """The data set of the task: fine-tuned on and evaluated."""
    corpus: str = ""
    """The data set of plain text for stages 1 and 2; empty: the text of the task's own rows (world: its stories)."""
    mixture: dict[str, PartConfig] = field(default_factory=dict)
    """Several data sets of plain text by name, in place of `corpus`."""
    corpus_column: str = "text"
    """Column of the corpus that holds the text."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    """What is done to texts before they are tokenised."""
    task: str = "question_answering"
    """Template that turns a row into (source, target); see yan_core/tasks.py."""
    max_source_tokens: int = 96
    """Longest source; what is over is cut at the template's side, and counted."""
    max_target_tokens: int = 16
    """Length of every target: the answer, then end-of-text to the end. A longer answer is a bad row."""
    window_tokens: int = 32
    """Length of the corpus windows of stages 1 and 2."""
    bad_rows_allowed: float = 0.0
    """Share of rows, and of files, that may be unusable (null, wrong type, target too long, unreadable); they are
    counted and set aside."""
    pool_batches: int = 8
    """Batches whose rows are sorted by length together: more means less padding, and batches that are less mixed, which
    costs quality (EXPERIMENTS, 2026-11-24)."""
    lanes: int = 8
    """Parts that each pool, and each batch, is made of, whatever the number of workers; a worker takes one or several,
    and where they do not go into the workers some wait for the others. The batches depend on it, so set it to the most
    workers there may ever be. A batch that it does not divide has as many lanes as divide both."""
    rows_per_shard: int = 4_096
    """Rows of an output file."""

    def __post_init__(self) -> None:
        lengths = ("max_source_tokens", "max_target_tokens", "window_tokens")
        for name in (*lengths, "pool_batches", "lanes", "rows_per_shard"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be >= 1, got {value}")
        _require(0 <= self.bad_rows_allowed <= 1, f"bad_rows_allowed must be in [0, 1], got {self.bad_rows_allowed}")
        _require(not (self.corpus and self.mixture), "corpus and mixture exclude each other, got both")
        shares = [part.share for part in self.mixture.values()]
        _require(
            not any(shares) or (all(shares) and math.isclose(sum(shares), 1, abs_tol=1e-6)),
            f"mixture.*.share must be given for every part and add up to 1, or for none; got {shares}",
        )


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """How training spreads over the cluster; the only section that changes from laptop to cluster."""

    num_workers: int | tuple[int, int] = 2
    """Ray Train workers; two numbers are the fewest and the most, between which the training follows the cluster."""
    use_gpu: bool = False
    """One GPU a worker; bfloat16 autocast is then used."""
    cpus_per_worker: float = 1.0
    """Logical CPUs a worker reserves; its PyTorch threads follow."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: every worker holds the whole model. `fsdp`: weights, gradients and optimizer are sharded over the workers,
    for models that do not fit (PyTorch's fully_shard)."""
    accumulation: int = 1
    """Passes that a worker cuts its part of a batch into; more of them need less memory."""
    recompute: bool = False
    """Compute the blocks' activations a second time in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile the loss with torch.compile; minutes at the start, on a CPU for nothing. Not measured on a GPU yet."""
    resize_every_s: float = 60.0
    """With fewest and most workers: seconds between looks at whether there is room for more than there are."""
    max_failures: int = 3
    """Worker failures after which training is given up; -1: never."""
    checkpoint_every_s: float = 20.0
    """Seconds between checkpoints, besides the one at the end of a stage."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept while training."""
    storage: str = ""
    """Folder or URL (s3://, gs://) for checkpoints that all nodes reach; empty: the run's folder. They are in
    `<storage>/<name>/training`: two runs of one name that train at once need two storages."""

    def __post_init__(self) -> None:
        least, most = self.min_workers, self.max_workers
        _require(1 <= least <= most, f"num_workers must be >= 1, or [fewest, most], got {self.num_workers}")
        _require(self.cpus_per_worker > 0, f"cpus_per_worker must be > 0, got {self.cpus_per_worker}")
        _require(self.resize_every_s >= 0, f"resize_every_s must be >= 0, got {self.resize_every_s}")
        _require(self.accumulation >= 1, f"accumulation must be >= 1, got {self.accumulation}")
        _require(self.max_failures >= -1, f"max_failures must be >= 0, or -1, got {self.max_failures}")
        _require(self.keep_checkpoints >= 1, f"keep_checkpoints must be >= 1, got {self.keep_checkpoints}")
        _require(self.checkpoint_every_s > 0, f"checkpoint_every_s must be > 0, got {self.checkpoint_every_s}")

    @property
    def min_workers(self) -> int:
        """Fewest workers."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Most workers."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


Method = Literal["euler", "midpoint", "heun"]
"""ODE solvers: order 1, 2 and 2; one, two and two trunk passes a step."""

Ranking = Literal["bayes_risk", "confidence"]
"""How the best of several candidates is found: the one most like the others, or the one the decoder is surest of."""

NUM_STEPS = 3
"""Solver steps of an answer for which none are named."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How answers are drawn, besides the number of solver steps."""

    method: Method = "euler"
    """ODE solver; `midpoint` and `heun` take two trunk passes a step."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is none, other values double the trunk passes. Wants flow_loss.source_drop_share."""
    num_candidates: int = 1
    """Answers drawn for each source in one batch, of which the best is given."""
    ranking: Ranking = "bayes_risk"
    """The best is the one most like the others, or the one the decoder is surest of."""

    def __post_init__(self) -> None:
        _require(self.num_candidates >= 1, f"num_candidates must be >= 1, got {self.num_candidates}")
        _require(math.isfinite(self.guidance_scale), f"guidance_scale must be finite, got {self.guidance_scale}")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured after training, and in its midst."""

    num_steps: tuple[int, ...] = (1, 2, 3, 4, 8)
    """Solver steps to evaluate the one model at."""
    max_rows: int = 1_500
    """Most validation rows."""
    batch_size: int = 64
    """Rows of a batch."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Solver, guidance and candidates."""
    diversity: int = 0
    """Answers drawn for each row, to tell how much they differ; 0: none. For these a baseline draws
    its tokens; otherwise it is greedy."""
    bertscore_model: str = ""
    """Local folder of an encoder, as `transformers` saves it, for BERTScore; empty: not measured."""
    perplexity_model: str = ""
    """Local folder of a causal language model, as `transformers` saves it, for perplexity; empty: not measured."""
    every_steps: int = 0
    """Steps of the fine-tuning between measurements on the first `rows_while_training` validation rows; 0: none."""
    rows_while_training: int = 200
    """Validation rows of a measurement while training."""
    keep: Literal["last", "best"] = "last"
    """Weights that the fine-tuning leaves: those of its last step, or those measured best, over all `num_steps`."""

    def __post_init__(self) -> None:
        _require(self.every_steps >= 0, f"every_steps must be >= 0, got {self.every_steps}")
        _require(
            self.keep == "last" or self.every_steps > 0,
            "keep=best wants every_steps > 0: nothing is measured while training",
        )
        _require(
            len(self.num_steps) > 0 and min(self.num_steps) >= 1,
            f"num_steps must name step counts >= 1, got {self.num_steps}",
        )
        _require(
            self.diversity == 0 or self.diversity >= 2,
            f"diversity must be 0 or >= 2 answers a row, got {self.diversity}",
        )
        for name in ("max_rows", "batch_size", "rows_while_training"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be >= 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow."""

    uri: str = ""
    """Tracking store; empty: MLFLOW_TRACKING_URI, else a SQLite file in the runs folder."""
    experiment: str = "yan"
    """Experiment name."""
    model_name: str = ""
    """Name in the model registry; empty: `yan-<run name>`."""
    alias: str = "champion"
    """Alias given to the new version."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run from raw text to a registered model."""

    name: str = "world"
    """The run's name and its folder below runs_dir."""
    runs_dir: str = "runs"
    """Where runs keep their data, checkpoints and model."""
    seed: int = 0
    """Every random draw follows from it, from the epoch and from the row; never from the worker."""
    init_from: str = ""
    """Model folder to start from instead of fresh weights; its tokenizer and architecture are kept."""
    log_every_s: float = 5.0
    """Seconds between progress lines."""
    data: DataConfig = field(default_factory=DataConfig)
    """Rows and task."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Text to token ids."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Architecture."""
    baseline: BaselineConfig | None = None
    """A model to train in place of YAN, on the same batches, to measure it against; it has no autoencoder."""
    autoencoder_loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    """Objective of stage 1."""
    flow_loss: FlowLossConfig = field(default_factory=FlowLossConfig)
    """Objective of stages 2 and 3."""
    stages: StagesConfig = field(default_factory=StagesConfig)
    """Steps, batch and optimizer of each stage."""
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    """Workers and checkpoints."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured at the end."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""

    def __post_init__(self) -> None:
        _require(
            bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name)) and self.name not in ("mlartifacts", "mlflow.db"),
            "name must be letters, digits, `_`, `-` and `.`, begin with a letter or digit and not be mlartifacts or "
            f"mlflow.db, which runs_dir holds already; got {self.name!r}",
        )
        _require(self.seed >= 0, f"seed must be >= 0, got {self.seed}")
        _require(self.log_every_s >= 0, f"log_every_s must be >= 0, got {self.log_every_s}")
        longest = max(self.data.max_source_tokens, self.data.max_target_tokens, self.data.window_tokens)
        _require(
            longest <= self.model.max_positions,
            f"model.max_positions={self.model.max_positions} is below the longest sequence of data.*_tokens, {longest}",
        )
        if self.baseline is not None:
            self._check_baseline(self.baseline)
        _require(
            not (self.flow_loss.even_experts and self.model.top_k),
            f"flow_loss.even_experts wants model.top_k 0, got {self.model.top_k}, by which few experts know a scope",
        )
        for stage in dataclasses.fields(self.stages):
            batch_size, lanes = getattr(self.stages, stage.name).batch_size, self.data.lanes
            _require(
                self.scaling.max_workers <= math.gcd(batch_size, lanes),
                f"scaling.num_workers={self.scaling.max_workers} is more than the lanes of stage {stage.name}, "
                f"{math.gcd(batch_size, lanes)}, and a worker takes whole lanes: these are as many as divide both "
                f"stages.{stage.name}.batch_size={batch_size} and data.lanes={lanes}",
            )

    def _check_baseline(self, baseline: BaselineConfig) -> None:
        _require(
            self.stages.autoencoder.max_steps == 0,
            "stages.autoencoder.max_steps must be 0 with a baseline, which has no autoencoder, "
            f"got {self.stages.autoencoder.max_steps}",
        )
        _require(
            self.scaling.strategy == "ddp" and not self.scaling.recompute,
            "scaling.strategy must be ddp and scaling.recompute false with a baseline",
        )
        _require(
            self.evaluation.sampling == SamplingConfig(),
            f"evaluation.sampling is for YAN and must be left out with a baseline, got {self.evaluation.sampling}",
        )
        for name in ("flow", "finetune"):
            trains = getattr(self.stages, name).trains
            _require(
                "flow" in trains,
                f"stages.{name}.trains must name flow with a baseline, which is all of it; got {trains}",
            )
        longest = self.data.max_source_tokens + self.data.max_target_tokens + 1  # and what is between them
        if self.stages.flow.max_steps:
            longest = max(longest, 2 * self.data.window_tokens + 1)
        _require(
            longest <= baseline.max_positions,
            f"baseline.max_positions={baseline.max_positions} is below source and target together, {longest}",
        )

    @property
    def architecture(self) -> ModelConfig | BaselineConfig:
        """Of what is trained: YAN, or the baseline in its place."""
        return self.model if self.baseline is None else self.baseline


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a config dataclass into plain dictionaries, lists and scalars, ready for YAML or JSON."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build a config dataclass from nested dictionaries, strictly.

    Args:
        cls: A dataclass of this module.
        values: Its settings; what is left out keeps its default.
        where: Dotted key of this section, for messages.

    Raises:
        UnknownName: On an unknown key; the nearest known one is offered.
        ValueError: On a wrong type or a value out of range; these messages too start with the dotted key.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'config'} must be a mapping of settings, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(typing.cast(Any, cls))]
    kwargs = {}
    for key, value in values.items():
        dotted = f"{where}.{key}" if where else str(key)
        if key not in known:
            raise UnknownName(unknown_name(dotted, str(key), known))
        kwargs[key] = _convert(hints[key], value, dotted)
    try:
        return cls(**kwargs)
    except ValueError as error:  # a section does not know where it stands
        raise ValueError(f"{where}.{error}" if where else str(error)) from error


def unknown_name(dotted: str, name: str, known: list[str]) -> str:
    """Say that a name is unknown, and which known one is nearest."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{dotted}: unknown name {name!r}{hint} Allowed: {', '.join(sorted(known))}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(Any, hint), value, where)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        fitting = [a for a in args if (typing.get_origin(a) is tuple) == isinstance(value, (list, tuple))]
        return _convert(next((a for a in fitting if a is not type(None)), args[0]), value, where)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where} must be one of {', '.join(map(repr, args))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} must be a list, got {value!r}")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise ValueError(f"{where} must be a list of {len(args)}, got {value!r}")
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping, got {value!r}")
        return {str(k): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be of type {hint.__name__}, got {value!r} ({type(value).__name__})")
    return value
