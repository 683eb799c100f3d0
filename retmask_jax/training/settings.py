"""How to train: the `train` section of a config as one frozen value."""

import dataclasses

from retmask_jax.model.config import DENSE_LAYERS, Lora
from retmask_jax.model.interventions import Head
from retmask_jax.training.losses import LOSSES, check_loss

OBJECTIVES = ("dpo", "sft", "contrast")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The `train` section of a config, plus the objective, the seed and the heads of one run. configs/default.py explains
    every key, and `runs.limits` checks what each number may be.

    objective is "dpo", the preference of chosen over rejected answers by `loss`; "sft", the likelihood of the chosen
    answers; or "contrast", `losses.contrast_loss` on the chosen answers. heads are the (layer, head) that are trained, see
    `optimizer.trained_parts`; None: all parameters are.
    """

    objective: str
    learning_rate: float
    final_learning_rate: float
    warmup: float
    steps: int
    batch_size: int
    microbatch_size: int
    seed: int
    heads: tuple[Head, ...] | None = None
    mlp: bool = False
    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.0
    per_token: bool = False
    nll_weight: float = 0.0
    contrast_strength: float = 0.5
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    compute_dtype: str = "bfloat16"
    first_moment_dtype: str = "float32"
    remat: bool = True
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = DENSE_LAYERS
    widths: int = 4
    reference_batch_size: int = 32
    checkpoint_every: int = 50
    keep: int = 2
    checkpoint_folder: str = ""
    profile: tuple[int, ...] = ()
    wandb: str = ""

    def __post_init__(self):
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        object.__setattr__(self, "profile", tuple(self.profile))
        if self.heads is not None:
            object.__setattr__(self, "heads", tuple(sorted({(layer, head) for layer, head in self.heads})))
        if self.heads == ():
            raise ValueError("no heads are left to train: name at least one, or None to train all parameters")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective is {self.objective!r}; it must be one of {', '.join(OBJECTIVES)}")
        check_loss(self.loss, self.beta, self.label_smoothing, self.gamma)
        if self.batch_size % self.microbatch_size:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of microbatch_size {self.microbatch_size}")
        for name in ("compute_dtype", "first_moment_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ValueError(f"train.{name} is {getattr(self, name)!r}; it must be float32 or bfloat16")
        if self.profile and (len(self.profile) != 2 or self.profile[0] >= self.profile[1]):
            raise ValueError(
                f"train.profile is {self.profile}; it must be the first step of the trace and the one after the last"
            )
        self.lora  # noqa: B018  (raises for settings that do not fit)

    @property
    def lora(self) -> Lora | None:
        """The adapters that are trained; None if all parameters are."""
        return Lora(self.lora_rank, self.lora_alpha, self.lora_targets) if self.lora_rank else None

    @property
    def start_dtype(self) -> str:
        """Dtype the start model is read in: float32 if all weights are trained, compute_dtype if they are frozen."""
        return "float32" if self.lora is None else self.compute_dtype

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with the start model's log-probabilities."""
        return self.objective == "dpo" and LOSSES[self.loss].reference

    @property
    def averages(self) -> bool:
        """Whether log-probabilities are taken per token of the answer."""
        return self.per_token or LOSSES[self.loss].per_token
