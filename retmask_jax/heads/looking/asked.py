"""What is asked of a model that is looked into: a text, a conversation, tokens or a needle case, as a prompt in tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from retmask_jax.data.chat import turns
from retmask_jax.data.needles import Case
from retmask_jax.data.prompter import make_prompter
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.heads.builtin_cases import builtin_cases
from retmask_jax.model.transformer import check_tokens

LENGTH = 2000  # tokens of a built-in prompt, or a quarter of the model's context if that is less

# A text, the turns of a conversation, tokens, a needle case, or None for a built-in one.
Prompt = str | Sequence[Mapping[str, str]] | Sequence[int] | Int[np.ndarray, " T"] | Case | None


@dataclasses.dataclass(frozen=True)
class Asked:
    """The tokens of a prompt; span: of what a right answer copies, None where that is not known."""

    tokens: tuple[int, ...]
    span: tuple[int, int] | None = None


def asked_of(
    lm: LanguageModel, prompt: Prompt, begin: str = "", chat: bool | None = None, new_tokens: int = 0
) -> Asked:
    """Returns a prompt in tokens.

    Args:
        prompt: A text is what the user of a chat model says; None: a built-in question about a code in a text.
        begin: How the reply begins; of a text or a conversation.
        chat: Whether texts and conversations pass through the chat template; None: if the model has one.
        new_tokens: The room that the model's context must leave.

    Raises:
        ValueError: The model has no tokenizer, the prompt has fewer than two tokens or too many, or `begin` is given for
            tokens.
    """
    asked = _asked(lm, prompt, begin, chat)
    if len(asked.tokens) < 2:
        raise ValueError(
            f"a prompt needs two tokens or more, this one has {len(asked.tokens)}: there is nothing to look at"
        )
    check_tokens(lm.config, np.array([asked.tokens], np.int32), new_tokens=new_tokens)
    return asked


def _asked(lm: LanguageModel, prompt: Prompt, begin: str, chat: bool | None) -> Asked:
    if prompt is None:
        (prompt,) = builtin_cases(lm, "test", 1, (min(LENGTH, lm.config.max_length // 4),), seed=1)
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _turns(prompt)
    if said:
        prompter = make_prompter(lm.tokenizer, chat=chat, template_kwargs={"enable_thinking": False})
        text = prompter.render_messages(said)
        return Asked(tuple(prompter.encode(prompter.begun(text, begin) if begin else text)[0]))
    if begin:
        raise ValueError(f"begin is {begin!r}, and the prompt is given as tokens: put the beginning's tokens after it")
    if isinstance(prompt, Case):
        return Asked(prompt.tokens, prompt.span if prompt.span[1] > prompt.span[0] else None)
    tokens = np.asarray(prompt)
    if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        raise ValueError(f"a prompt is a text, turns, a case or whole numbers (T,), not {tokens.dtype}{tokens.shape}")
    return Asked(tuple(tokens.tolist()))


def _turns(prompt: Any) -> list[Mapping[str, str]]:
    """The turns of a conversation; nothing where the prompt is none."""
    several = isinstance(prompt, Sequence) and not isinstance(prompt, str)
    return list(turns(list(prompt))) if several and any(isinstance(turn, Mapping) for turn in prompt) else []
