"""`rm.look`: what heads look at in one prompt, as arrays, as a page, and in a notebook."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from markupsafe import Markup

from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.heads.looking.asked import Prompt
from retmask_jax.heads.looking.looks import Looks, Reply, look_at, question_of
from retmask_jax.heads.scores import HeadScores
from retmask_jax.model.interventions import Head
from retmask_jax.reports.looking.page import looking_page
from retmask_jax.utils.files import write_atomically

_HEIGHT = 860  # of the page in a notebook, in pixels


class Look:
    """What `look` returns. In a notebook it shows its page; `save` writes it.

    Attributes:
        looks: Everything that was found.
        heads: The chosen heads, best first.
        scores: Of all heads.
        replies: The answer, and that of the model with the chosen heads masked; each with the probabilities of its tokens in
            both models, and what the heads look at.
        tokens: The texts of the tokens of the prompt and of the first answer.
        attention: f32[N, S, heads]: the weights with which the chosen heads look at all S tokens of prompt and answer while
            the untouched model predicts each of the N tokens of the first answer.
    """

    def __init__(self, looks: Looks) -> None:
        self.looks = looks
        self.heads = looks.heads
        self.scores = looks.scores
        self.replies: list[Reply] = looks.replies
        self.tokens: list[str] = [*looks.texts, *looks.replies[0].texts]
        self.attention: Float32[np.ndarray, "N S heads"] = looks.replies[0].attention

    def __repr__(self) -> str:
        said = ", ".join(f"{reply.name}: {''.join(reply.texts)!r}" for reply in self.replies)
        return f"Look({len(self.looks.prompt)} tokens, heads {self.heads}, {said})"

    def _repr_html_(self) -> str:
        page = looking_page(self.looks)
        frame = '<iframe title="Where heads look" style="width:100%;height:{}px;border:0" srcdoc="{}"></iframe>'
        return Markup(frame).format(_HEIGHT, str(page))

    def save(self, path: str | os.PathLike) -> None:
        """Writes the page, one HTML file that needs no network."""
        write_atomically(Path(path), looking_page(self.looks))

    def patterns(self, least: float = 0.01) -> tuple[list[str], Float32[np.ndarray, "heads T T"]]:
        """Returns tokens and attention patterns as CircuitsVis draws them: `attention_patterns(tokens, attention)`.

        T counts the tokens that predict the first answer, and those at which a chosen head looks with a weight of at least
        `least`. The rows of other tokens are 0, as what they look at was not measured.
        """
        n, size, n_heads = self.attention.shape
        predicting = np.arange(size - 1 - n, size - 1)
        shown_T = np.union1d(predicting, np.flatnonzero((self.attention >= least).any(axis=(0, 2))))
        patterns = np.zeros((n_heads, len(shown_T), len(shown_T)), np.float32)
        patterns[:, np.searchsorted(shown_T, predicting)] = self.attention[:, shown_T].transpose(2, 0, 1)
        return [self.tokens[i] for i in shown_T], patterns


def look(
    lm: LanguageModel,
    prompt: Prompt = None,
    answer: str | Sequence[int] | None = None,
    heads: int | Sequence[Head] | None = None,
    *,
    scores: HeadScores | str | os.PathLike | None = None,
    begin: str = "",
    chat: bool | None = None,
    max_new_tokens: int = 24,
) -> Look:
    """Shows where heads look in a prompt while the model predicts each token of its answer, and what it says without them.

    The prompt passes through the model twice, untouched and with the chosen heads masked; memory is linear in its length.

    Args:
        lm: The model. Without a tokenizer it needs the prompt in tokens.
        prompt: A text, which is what the user of a chat model says; the turns of a conversation; tokens; or a needle case.
            None: a built-in question about a code in a text of 2,000 tokens, or of a quarter of the model's context.
        answer: What the model is to say, a text or tokens. None: its own greedy answer.
        heads: Which are shown first, and masked: [(layer, head), ...], or how many of the best by score. None: the best 8.
        scores: Of all heads: HeadScores or a file of them. None: the copy score in this prompt, which is the share of the
            answer's tokens found in the prompt (of a needle case: of the needle's) that a head copies, as sets. A head copies
            a token if the key that it weighs most when the token is predicted is that token.
        begin: How the reply to a text begins.
        chat: Whether a text passes through the chat template; None: if the model has one.
        max_new_tokens: The longest answer of the model.

    Raises:
        ValueError: The prompt is too short or too long, heads or scores are not of this model, or no head copies.

    >>> import retmask_jax as rm
    >>> text = "the old farmer found the lamp . the home of anna : oslo . the wolf slept . the home of anna"
    >>> seen = rm.look(rm.load("bundled"), text, heads=[(1, 0), (1, 1), (1, 2), (1, 3)], max_new_tokens=2)
    >>> seen.heads, ["".join(reply.texts) for reply in seen.replies]
    ([(1, 0), (1, 1), (1, 2), (1, 3)], [' oslo .', ' berlin .'])
    >>> seen.attention.shape, seen.tokens[seen.attention[0, :, 0].argmax()]
    ((2, 26, 4), ' oslo')
    >>> seen.save("look.html")
    """
    options = {"scores": scores, "begin": begin, "chat": chat, "max_new_tokens": max_new_tokens}
    return Look(look_at(lm, question_of(lm, prompt, answer, heads, **options)))
