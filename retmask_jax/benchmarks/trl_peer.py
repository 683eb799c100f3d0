"""TRL's DPOTrainer on a random model: its own data pipeline, training_step and optimiser, one update at a time."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.benchmarks.models import read_shape
from retmask_jax.benchmarks.peers import load_peer, require


class TrlPeer:
    """One DPOTrainer, stepped by hand.

    precomputed False is TRL as RetMask ran it: the frozen reference model stands beside the trained one and is run in
    every step. True: the reference's log-probabilities are computed once, when the trainer is made.
    """

    def __init__(self, folder: Path, pairs: Mapping[str, np.ndarray], settings, work: Path, *, precomputed: bool):
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
    def tokens(self) -> np.ndarray:
        """i64[2 * pairs, T]: the rows the trainer made of the pairs, chosen first."""
        return self._batch["input_ids"].cpu().numpy()

    @property
    def reference(self) -> np.ndarray | None:
        """f32[2, pairs]: the reference's log-probabilities of chosen and rejected answers, where precomputed."""
        names = "ref_chosen_logps", "ref_rejected_logps"
        return np.stack([self._batch[name].cpu().numpy() for name in names]) if names[0] in self._batch else None

    def step(self, learning_rate: float) -> dict[str, float]:
        """Forward, backward, clip and AdamW; returns loss, gradient_norm and the trainer's own mean rewards."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        loss = self._trainer.training_step(self._model, dict(self._batch))
        norm = self._torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        self._model.zero_grad()
        seen = {
            f"reward_{side}": self._trainer._metrics["train"][f"rewards/{side}"][-1] for side in ("chosen", "rejected")
        }
        return {"loss": float(loss), "gradient_norm": float(norm), **{name: float(x) for name, x in seen.items()}}


def word_tokenizer(vocab_size: int):
    """A tokenizer whose word [7] is token 7; token 2 ends a text."""
    transformers, tokenizers = require("transformers"), require("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"[{i}]": i for i in range(vocab_size)}, "[1]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[0]", "unk_token": "[1]", "eos_token": "[2]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def _trainer(folder, pairs, settings, work, precomputed):
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
        "max_length": pairs["chosen"].shape[1],
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


def _records(pairs) -> list[dict[str, str]]:
    """Texts that tokenize to the rows; every answer ends with the EOS that the trainer wants there."""
    first = int(np.argmax(pairs["chosen_mask"][0]))
    sides = zip(pairs["chosen"], pairs["rejected"], strict=True)
    return [
        {
            "prompt": _text(chosen[:first]),
            "chosen": _text(chosen[first:], " "),
            "rejected": _text(rejected[first:], " "),
        }
        for chosen, rejected in sides
    ]


def _text(ids, start: str = "") -> str:
    return start + " ".join(f"[{i}]" for i in ids)
