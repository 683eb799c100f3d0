"""What others run today on transformers, torch and TRL: detection, generation, DPO training; masks are in `mask_peers`.

torch and TRL are imported by the functions that need them, so that the package works without them.
"""

import dataclasses
import importlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from retmask_jax.benchmarks.harness import cores
from retmask_jax.benchmarks.models import read_shape
from retmask_jax.training.settings import Settings


def require(name: str) -> ModuleType:
    """Import a package of the extra `bench`; torch is set to use all cores.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{name} cannot be imported ({error}): install retmask_jax[bench]") from error
    if name == "torch":
        module.set_num_threads(cores())
    return module


def load_peer(folder: Path, dtype: str, attention: str = "sdpa") -> Any:
    """Load the transformers model of a checkpoint, on the GPU where torch has one."""
    torch, transformers = require("torch"), require("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=attention, trust_remote_code=False
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


# --- detection ---


@dataclasses.dataclass(frozen=True)
class Detected:
    """What the published detector saw in one case.

    tokens: decoded. argmax: the key with the largest attention weight, for each token and head. copied: the tokens that
    each head copied, [L][H][...]. weights: attention to all keys, [N][L][H,S], where they are kept.
    """

    tokens: Int64[np.ndarray, " N"]
    argmax: Int64[np.ndarray, "N L H"]
    copied: list[list[list[int]]]
    weights: list[list[np.ndarray]]


def published_detection(
    model: Any,
    prompt: Sequence[int],
    span: tuple[int, int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    line_ends: Collection[int] = (),
    fixed: Sequence[int] | None = None,
    keep_weights: bool = False,
) -> Detected:
    """Run the published detector on one case: decode greedily with attention weights returned, and loop over heads.

    Args:
        span: start and end of the needle in the prompt.
        line_ends: tokens that end the answer once it has a token that is none of them.
        fixed: tokens to take in place of the decoded ones.
        keep_weights: return the attention weights of every step, too.
    """
    torch, transformers = require("torch"), require("transformers")
    start, end = span
    prompt_ids = torch.tensor([prompt], device=model.device)
    n_layers, n_heads = model.config.num_hidden_layers, model.config.num_attention_heads
    tokens, argmax, weights = [], [], []
    copied: list[list[list[int]]] = [[[] for _ in range(n_heads)] for _ in range(n_layers)]
    with torch.no_grad():
        cache = transformers.DynamicCache()
        model.set_attn_implementation("sdpa")
        model(prompt_ids[:, :-1], None, None, cache, use_cache=True, logits_to_keep=1)
        model.set_attn_implementation("eager")
        step_ids = prompt_ids[:, -1:]
        for step in range(max_new_tokens if fixed is None else len(fixed)):
            out = model(step_ids, None, None, cache, use_cache=True, output_attentions=True)
            step_ids = out.logits[0, -1].argmax() if fixed is None else torch.tensor(fixed[step], device=model.device)
            token = step_ids.item()
            if token in stop_ids or (token in line_ends and set(tokens) - set(line_ends)):
                break
            keys_LH = np.zeros((n_layers, n_heads), np.int64)
            for layer in range(n_layers):
                for head in range(n_heads):
                    for key in out.attentions[layer][0][head][-1].topk(1).indices:
                        if start <= key < end and token == prompt_ids[0, key].item():
                            copied[layer][head].append(token)
                        keys_LH[layer, head] = key
            tokens.append(token)
            argmax.append(keys_LH)
            if keep_weights:
                weights.append([layer[0, :, -1].float().cpu().numpy() for layer in out.attentions])
            step_ids = step_ids.view(1, 1)
    return Detected(np.array(tokens), np.array(argmax), copied, weights)


# --- generation ---


def generate(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, pad_id: int
) -> Int64[np.ndarray, "B N"]:
    """Greedy continuations of left-padded prompts by transformers' generate; no token stops them."""
    torch = require("torch")
    width = max(map(len, prompts))
    tokens = torch.full((len(prompts), width), pad_id)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[width - len(prompt) :] = torch.tensor(prompt)
    seen = torch.arange(width) >= torch.tensor([[width - len(prompt)] for prompt in prompts])
    # Without an EOS id neither side stops, and no logit has to be suppressed.
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        out = model.generate(
            tokens.to(model.device),
            attention_mask=seen.long().to(model.device),
            do_sample=False,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            pad_token_id=pad_id,
        )
    return out[:, width:].cpu().numpy()


def next_logits(model: Any, tokens: Sequence[int]) -> Float32[np.ndarray, " V"]:
    """Logits of the token after `tokens`."""
    torch = require("torch")
    with torch.no_grad():
        ids = torch.tensor([list(tokens)], device=model.device)
        return model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].float().cpu().numpy()


# --- DPO training ---


class TrlPeer:
    """TRL's DPOTrainer with TRL's data pipeline, training_step and optimiser, run one update at a time."""

    def __init__(
        self, folder: Path, pairs: Mapping[str, np.ndarray], settings: Settings, work: Path, *, precomputed: bool
    ):
        """Make the trainer and its batch.

        Args:
            work: folder for the trainer's files.
            precomputed: False is TRL as RetMask ran it: the frozen reference model is held as well and run in every
                step. True: the reference's log-probabilities are computed once, when the trainer is made.
        """
        torch = require("torch")
        os.environ["TQDM_DISABLE"] = "1"
        self._torch = torch
        self._trainer = _trainer(folder, pairs, settings, work, precomputed)
        self._model = self._trainer.accelerator.prepare(self._trainer.model)
        self._trainer.current_gradient_accumulation_steps = 1  # what train() would set
        self._optimizer = self._trainer.create_optimizer()
        # The trainer's loader would shuffle.
        self._batch = self._trainer.data_collator(list(self._trainer.train_dataset))
        self._clip = settings.clip

    @property
    def tokens(self) -> Int64[np.ndarray, "rows T"]:
        """The rows that the trainer made of the pairs: all chosen ones, then all rejected ones."""
        return self._batch["input_ids"].cpu().numpy()

    @property
    def reference(self) -> Float32[np.ndarray, "pairs 2"]:
        """The precomputed log-probabilities of chosen and rejected answers under the reference."""
        return np.stack([self._batch[f"ref_{side}_logps"].cpu().numpy() for side in ("chosen", "rejected")], axis=1)

    def step(self, learning_rate: float) -> dict[str, float]:
        """Forward, backward, clip and AdamW; returns loss, gradient_norm and the trainer's mean rewards."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        loss = self._trainer.training_step(self._model, dict(self._batch))
        norm = self._torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        self._model.zero_grad()
        metrics = self._trainer._metrics["train"]
        rewards = {f"reward_{side}": float(metrics[f"rewards/{side}"][-1]) for side in ("chosen", "rejected")}
        return {"loss": float(loss), "gradient_norm": float(norm), **rewards}


def token_rows(pairs: Mapping[str, np.ndarray]) -> Int64[np.ndarray, "rows T"]:
    """The rows that a trainer makes of pairs without padding: all prompts with chosen answers, then with rejected ones."""
    chosen, rejected = pairs["answers"].swapaxes(0, 1)
    return np.concatenate([np.concatenate([pairs["prompts"], side], axis=1) for side in (chosen, rejected)], dtype=int)


def word_tokenizer(vocab_size: int) -> Any:
    """A tokenizer whose word [7] is token 7; token 2 ends a text."""
    transformers, tokenizers = require("transformers"), require("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"[{i}]": i for i in range(vocab_size)}, "[1]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[0]", "unk_token": "[1]", "eos_token": "[2]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def _trainer(folder: Path, pairs: Mapping[str, np.ndarray], settings: Settings, work: Path, precomputed: bool) -> Any:
    trl, datasets = require("trl"), require("datasets")
    datasets.disable_progress_bars()
    arguments: dict[str, Any] = {
        "output_dir": str(work),
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": settings.batch_size,
        "gradient_checkpointing": settings.remat,
        "bf16": settings.compute_dtype == "bfloat16",
        "beta": settings.beta,
        "learning_rate": settings.learning_rate,
        "adam_beta1": settings.b1,
        "adam_beta2": settings.b2,
        "adam_epsilon": settings.eps,
        "weight_decay": settings.weight_decay,
        "max_length": pairs["prompts"].shape[1] + pairs["answers"].shape[2],
        "precompute_ref_log_probs": precomputed,
        "dataloader_pin_memory": False,
        "seed": 0,
        "max_prompt_length": None,  # older versions cut prompts
    }
    known = {field.name for field in dataclasses.fields(trl.DPOConfig)}
    return trl.DPOTrainer(
        model=load_peer(folder, "float32"),
        ref_model=None if precomputed else load_peer(folder, "float32"),
        args=trl.DPOConfig(**{name: value for name, value in arguments.items() if name in known}),
        train_dataset=datasets.Dataset.from_list(_records(pairs)),
        processing_class=word_tokenizer(read_shape(folder).vocab_size),
    )


def _records(pairs: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
    """Texts that tokenize to the pairs; every answer ends with the EOS that the trainer wants there."""
    return [
        {"prompt": _text(prompt), "chosen": _text(chosen, " "), "rejected": _text(rejected, " ")}
        for prompt, (chosen, rejected) in zip(pairs["prompts"], pairs["answers"], strict=True)
    ]


def _text(ids: Iterable[int], start: str = "") -> str:
    return start + " ".join(f"[{i}]" for i in ids)
