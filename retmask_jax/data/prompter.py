"""The tokens of a prompt, from a context and a question or from a conversation."""

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from retmask_jax.utils.files import digest


def check_template(key: str, template: str) -> None:
    """Raises ValueError, which names the config key, for a format string whose fields are not exactly {context} and
    {question}."""
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"{key} {template!r} is no format string: {error}; a brace itself is written twice") from error
    if names != {"context", "question"}:
        there = ", ".join(f"{{{name}}}" for name in sorted(names)) or "none"
        raise ValueError(f"{key} {template!r} must have the fields {{context}} and {{question}}, it has {there}")


# A prompt's format, in a chat template and without one.
CHAT = "{context}\n\n{question}"
PLAIN = "{context}\n\nQuestion: {question}\nAnswer:"


@dataclasses.dataclass(frozen=True)
class Prompter:
    """Turns a context and a question into the tokens of a prompt.

    Attributes:
        tokenizer: A fast tokenizer of transformers.
        prompt: Format string with the fields {context} and {question}.
        chat: Whether the tokenizer's chat template is applied.
        template_kwargs: Arguments for the chat template, such as enable_thinking=False.
    """

    tokenizer: Any
    prompt: str = "{context} {question}"
    chat: bool = True
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_template("prompt.template", self.prompt)
        if self.tokenizer is None:
            raise ValueError("the model folder has no tokenizer, which text prompts need")
        if not self.tokenizer.is_fast:
            raise ValueError("the tokenizer reports no character offsets; a fast one (tokenizer.json) is needed")
        if self.chat and not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: add one to it, or set the config key chat to False")

    def render(self, context: str, question: str) -> str:
        """Returns the text of a prompt, as the model gets it before tokenization."""
        return self.render_messages([{"role": "user", "content": self._fill(context, question)}])

    def render_messages(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Returns the text of a conversation up to where the model's answer begins."""
        if not self.chat:
            return "\n".join(message["content"] for message in messages)
        kwargs = dict(self.template_kwargs) | {"tokenize": False, "add_generation_prompt": True}
        try:
            return self.tokenizer.apply_chat_template(list(messages), **kwargs)
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"the tokenizer's chat template refuses a conversation of the roles {roles}: {error}"
            ) from error

    def begun(self, text: str, beginning: str) -> str:
        """Returns the text of a prompt with the beginning of the answer after it.

        >>> import retmask_jax as rm
        >>> prompter = Prompter(rm.load("bundled").tokenizer, "{context} Question: {question} Answer:", chat=False)
        >>> prompter.begun("Question: Who won? Answer:", "The winner is")
        'Question: Who won? Answer: The winner is'
        """
        return text + beginning if text[-1:].isspace() else f"{text} {beginning}"

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns token ids and the range of characters of each.

        The tokenizer adds special tokens only if there is no chat template, which writes them itself.
        """
        encoded = self.tokenizer(text, add_special_tokens=not self.chat, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each text, as `encode` does."""
        return self.tokenizer(list(texts), add_special_tokens=not self.chat)["input_ids"]

    def count(self, text: str) -> int:
        """Returns the number of tokens that `encode` gives, in half its time."""
        return self.counts([text], special=not self.chat)[0]

    def counts(self, texts: Sequence[str], *, special: bool) -> list[int]:
        """Returns the number of tokens of each text; special: whether the tokenizer's special tokens around it
        count."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # a tokenizer.json may ask for it; calls of the tokenizer turn it off, too
        backend.no_padding()
        return [len(encoding) for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=special)]

    def identity(self) -> str:
        """Returns a hash of the tokenizer, the chat template, its arguments and the format string."""
        template = self.tokenizer.chat_template if self.chat else None
        tokens = self.tokenizer.backend_tokenizer.to_str()
        return digest([tokens, template, self.prompt, self.chat, dict(self.template_kwargs)])

    def _fill(self, context: str, question: str) -> str:
        return self.prompt.format(context=context, question=question).strip()


def make_prompter(
    tokenizer: Any,
    template: str | None = None,
    plain_template: str = PLAIN,
    *,
    chat: bool | None,
    template_kwargs: Mapping[str, Any],
) -> Prompter:
    """Returns the prompter that suits a model.

    Args:
        tokenizer: As of Prompter.
        template: Format string; None for `CHAT`.
        plain_template: Format string instead, where chat is None and the tokenizer has no chat template.
        chat: Whether the chat template is applied; None: if the tokenizer has one.
        template_kwargs: As of Prompter.
    """
    if chat is None:
        chat = bool(getattr(tokenizer, "chat_template", None))
        template = template if chat else plain_template
    return Prompter(tokenizer, template or CHAT, chat, template_kwargs)
