"""Settings of the backbone, sampling and training, free of torch: the command line is parsed before torch loads.

On the command line every field is a flag, and the text below it is its help.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from .inputs import require_at_least_1

MIXERS = ("mamba", "bimamba", "s4d", "s4", "lru", "attention", "mlp", "moe")
NORMS = ("rms", "layer")
MLPS = ("swiglu", "gelu")
Expert = Literal["relu", "gelu", "swiglu"]


# The formulas are in moe.py.
@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixtures of experts, by default MoE-Mamba's."""

    n_experts: int = 42
    """Experts of each moe layer."""
    top_k: int = 1
    """Experts that a token goes to: those that its router finds likeliest."""
    normalise: bool = False
    """Divide the weights of a token's experts by their sum, as GShard and Mixtral do: for top_k of at least 2."""
    d_expert: int | None = None
    """Inner width of an expert; 3 times the model's width if left out."""
    expert: Expert = "relu"
    """What stands between an expert's two matrices; swiglu has a third one, which gates."""
    capacity_factor: float | None = None
    """In training, an expert takes at most so many times its even share of a batch's tokens, the first ones, and what
    comes later passes it by; no limit if left out. Never in evaluation."""
    balance_weight: float = 0.01
    """Of the load-balancing loss, which is 1 (times top_k) where all experts get equally many tokens."""
    z_weight: float = 0.0
    """Of the router's z-loss, which keeps its logits small; 0.001 is usual."""

    def __post_init__(self) -> None:
        if self.n_experts < 1:
            raise ValueError(f"n_experts is {self.n_experts}; it must be at least 1")
        if not 1 <= self.top_k <= self.n_experts:
            raise ValueError(f"top_k is {self.top_k}; it must be between 1 and n_experts, which is {self.n_experts}")
        if self.normalise and self.top_k == 1:
            raise ValueError(
                "normalise is set with top_k 1: its one weight would always be 1, and the router not learn"
            )
        if self.expert not in get_args(Expert):
            raise ValueError(f"expert is {self.expert!r}; it must be one of {', '.join(get_args(Expert))}")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ValueError(
                f"capacity_factor is {self.capacity_factor}; it must be above 0 and finite, or None for no limit"
            )
        for name in ("balance_weight", "z_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number of at least 0")

    def width(self, d_model: int) -> int:
        """Inner width of an expert. Raises ValueError for widths that a grouped matrix product cannot take."""
        width = 3 * d_model if self.d_expert is None else self.d_expert
        for name, value in (("d_model", d_model), ("d_expert", width)):
            if value < 1 or value % 8:
                raise ValueError(
                    f"{name} is {value}; of a moe layer it must be a multiple of 8: the grouped matrix product reads "
                    "rows of whole 16 bytes"
                )
        return width


@dataclass(frozen=True, kw_only=True)
class LRUConfig:
    """Where the eigenvalues of an lru layer begin: in a ring of the complex plane (arXiv 2303.06349, section 3)."""

    n_states: int | None = None  # complex states of a layer; None: as many as d_model
    r_min: float = 0.0  # the ring's radii: near 1 remembers long
    r_max: float = 1.0
    max_phase: float = 2 * math.pi  # the largest angle: a small one (pi / 10) suits very long sequences

    def __post_init__(self) -> None:
        if self.n_states is not None and self.n_states < 1:
            raise ValueError(f"n_states is {self.n_states}; it must be at least 1, or None for d_model")
        if not 0 <= self.r_min < self.r_max <= 1:
            raise ValueError(f"r_min is {self.r_min}, r_max {self.r_max}; it must be 0 <= r_min < r_max <= 1")
        if not 0 < self.max_phase <= 2 * math.pi:
            raise ValueError(f"max_phase is {self.max_phase}; it must be above 0 and at most 2 pi")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Shape of a stack of residual blocks around mixers.

    ("mamba",) is Mamba, ("attention", "mlp") a Transformer, ("mamba", "mamba", "mamba", "attention") a hybrid,
    ("mamba", "moe") MoE-Mamba, ("mamba+moe",) its parallel form: a layer that adds what both make of the same input.
    """

    d_model: int
    n_layer: int
    pattern: tuple[str, ...] = ("mamba",)  # layers cycle through it; each entry one of MIXERS, or several joined by +
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2  # inner width / d_model
    dt_rank: int | None = None  # None: ceil(d_model / 16)
    n_heads: int | None = None  # of attention; None: one for each 64 channels of d_model, at least one
    rope_theta: float | None = 10000.0  # the base of attention's rotary positions (RoPE); None: no positions (NoPE)
    mlp: str = "swiglu"  # one of MLPS
    mlp_bias: bool = False
    d_ff: int | None = None  # inner width of mlp; None: 4 d_model for gelu, as many parameters for swiglu
    moe: MoEConfig = MoEConfig()
    lru: LRUConfig = LRUConfig()
    s4_state: int = 64  # of s4d and s4, real numbers of a channel's state
    s4d_complex: bool = True
    dropout: float = 0.0  # on what each mixer adds to the residual stream
    norm: str = "rms"  # one of NORMS: RMSNorm, or LayerNorm with a bias
    norm_eps: float = 1e-5
    final_norm: bool = True  # one more norm, after the last block

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", tuple(self.pattern))  # JSON gives a list
        unknown = [name for entry in self.pattern for name in entry.split("+") if name not in MIXERS]
        if unknown or not self.pattern:
            raise ValueError(
                f"pattern {self.pattern} names {unknown or 'nothing'}; its entries are {', '.join(MIXERS)}, or several "
                "of them joined by +"
            )
        if self.norm not in NORMS:
            raise ValueError(f"norm is {self.norm!r}; it must be one of {', '.join(NORMS)}")
        for name in ("d_model", "n_layer", "d_state", "d_conv", "expand", "s4_state"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("n_heads", "d_ff"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1, or None for the default")
        if self.s4_state % 2 and ("s4" in self.mixers or ("s4d" in self.mixers and self.s4d_complex)):
            raise ValueError(f"s4_state is {self.s4_state}; complex states need an even number")
        if self.mlp not in MLPS:
            raise ValueError(f"mlp is {self.mlp!r}; it must be one of {', '.join(MLPS)}")
        if self.rope_theta is not None and not 0 < self.rope_theta < math.inf:
            raise ValueError(
                f"rope_theta is {self.rope_theta}; it must be above 0 and finite, or None for no positions"
            )
        if "moe" in self.mixers:
            self.moe.width(self.d_model)
        if "attention" in self.mixers:
            if self.d_model % self.heads:
                raise ValueError(f"n_heads is {self.heads}; it must divide d_model, which is {self.d_model}")
            if self.rope_theta is not None and self.d_model // self.heads % 2:
                raise ValueError(
                    f"n_heads is {self.heads}: of d_model {self.d_model} each head has {self.d_model // self.heads} "
                    "channels, and RoPE needs an even number; choose other n_heads, or rope_theta None"
                )

    @property
    def mixers(self) -> set[str]:
        """The mixers that occur in the pattern."""
        return {name for entry in self.pattern for name in entry.split("+")}

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        """Rank of the projection that makes the step sizes."""
        return -(-self.d_model // 16) if self.dt_rank is None else self.dt_rank

    @property
    def heads(self) -> int:
        """Heads of attention."""
        return max(1, self.d_model // 64) if self.n_heads is None else self.n_heads

    @property
    def ff_width(self) -> int:
        """Inner width of mlp: swiglu has three matrices for gelu's two; its default is rounded up to whole 64s."""
        if self.d_ff is not None:
            return self.d_ff
        return 4 * self.d_model if self.mlp == "gelu" else -(-8 * self.d_model // (3 * 64)) * 64

    @property
    def bidirectional(self) -> bool:
        return "bimamba" in self.mixers


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """A backbone between a token embedding and a head over the vocabulary."""

    backbone: BackboneConfig
    vocab_size: int
    tie_embeddings: bool = True


# Applied in the order that sampling.py gives.
@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen."""

    temperature: float = 1.0
    """Divides the logits: below 1 favours the likely tokens; 0 always takes the likeliest (greedy)."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens whose probabilities sum to at least this; 1 keeps all."""
    min_p: float = 0.0
    """Keep the tokens at least this share as probable as the likeliest one; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that occurred already less likely; 1 for none."""
    repetition_window: int = 0
    """How many of the last tokens count for the penalty, the prompt's included; 0 for all."""

    def __post_init__(self) -> None:
        # Below 1e-4 a division by the temperature would be greedy anyway, up to where it overflows.
        if self.temperature != 0 and not 1e-4 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or finite and at least 0.0001")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (off)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be between 0 (off) and 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0 and finite (1: off)")
        for name, meaning in (("top_k", "off"), ("repetition_window", "all tokens")):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 ({meaning}) or more")


# The rules are in speculation.py.
@dataclass(frozen=True, kw_only=True)
class SpeculationConfig:
    """How drafts are made and judged."""

    draft_length: int = 8
    """With a draft: most tokens guessed for one forward of the model."""
    acceptance: Literal["exact", "top3"] = "exact"
    """exact: every text is as probable as without drafts; top3: keeps any draft among the model's 3 likeliest tokens,
    which is faster, but changes what is written."""

    def __post_init__(self) -> None:
        require_at_least_1(draft_length=self.draft_length)


# Of TrainConfig: what changes the way to a result and not the result. A run may resume with others.
SAME_RESULT = ("save_every", "workers", "fsdp", "context_parallel", "expert_parallel", "stall", "cuda_graph")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train."""

    epochs: int = 20
    batch_size: int = 64
    """Sequences in a batch."""
    max_tokens: int = 65536
    """Most tokens in a batch, padding included: long sequences get smaller batches."""
    accumulation: int = 1
    """Batches whose gradients are added up for one step; of several processes, all batches of all of them, so that
    the result does not depend on how many there are. Their number has to divide it."""
    lr: float = 2e-3
    """Peak learning rate; a linear warm-up leads to it, a cosine from it to 0."""
    warmup: float = 0.1
    """Share of training spent warming up."""
    weight_decay: float = 0.1
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.99
    """Decay of the moving average of the weights, which is what is evaluated and saved; 0 for none."""
    patience: int = 0
    """Stop after this many epochs without a better validation score; 0 to train all epochs."""
    save_every: int = 200
    """Steps between the checkpoints for --resume (each epoch's end has one anyway)."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward: less memory, a third more time."""
    cuda_graph: bool = False
    """Launch the forward and backward of all batches of a shape as a CUDA graph, for the same numbers. Of use where the
    GPU waits for the processor: 2 to 4 times as fast for small models of images. For these, and for causal models of
    bytes and DNA; of several processes, where each has the whole model and whole sequences."""
    workers: int = 0
    """Processes that prepare batches; 0 prepares them in the main one."""
    fsdp: bool = False
    """Divide weights and optimizer among the processes that `accelerate launch` or torchrun started (FSDP2)."""
    context_parallel: int = 1
    """Cut each sequence into so many pieces, for as many of the processes: for windows longer than one GPU holds. For
    language models of bytes and DNA, of mamba, bimamba, mlp and moe."""
    expert_parallel: int = 1
    """Spread each layer's experts over so many of the processes, and divide all other weights as --fsdp does."""
    stall: int = 1800
    """With several processes: seconds without progress after which the run ends and names the one that is stuck."""

    def __post_init__(self) -> None:
        if self.cuda_graph and self.gradient_checkpointing:
            raise ValueError("cuda_graph and gradient_checkpointing exclude each other; leave one of them out")
        require_at_least_1(
            epochs=self.epochs,
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            accumulation=self.accumulation,
            save_every=self.save_every,
            stall=self.stall,
            context_parallel=self.context_parallel,
            expert_parallel=self.expert_parallel,
        )
        for name in ("weight_decay", "patience", "workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number above 0")
        if not 0 <= self.warmup < 1 or not 0 <= self.ema < 1:
            raise ValueError(f"warmup ({self.warmup}) and ema ({self.ema}) must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Where and how exactly to compute: the same flags on every verb."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a CUDA GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 mixed precision on a GPU, float32 on a CPU."""
    seed: int = 0
    debug: bool = False
    """Show a traceback when something fails."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")
