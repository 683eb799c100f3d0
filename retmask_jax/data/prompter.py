"""From a context and a question, or a conversation, to the tokens of a prompt."""

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from retmask_jax.utils.files import digest


def check_template(template: str) -> None:
    """ValueError for a format string that does not hold {context} and {question}, or holds other fields."""
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(
            f"prompt.template {template!r} is no format string: {error}; a brace itself is written twice"
        ) from error
    if names != {"context", "question"}:
        there = ", ".join(f"{{{name}}}" for name in sorted(names)) or "none"
        raise ValueError(
            f"prompt.template {template!r} must have the fields {{context}} and {{question}}, it has {there}"
        )


@dataclasses.dataclass(frozen=True)
class Prompter:
    """Turns a context and a question into the tokens of a prompt.

    prompt: a format string with {context} and {question}. chat: put it in the tokenizer's chat template, with
    template_kwargs (such as enable_thinking=False) handed on.
    """

    tokenizer: Any
    prompt: str = "{context} {question}"
    chat: bool = True
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_template(self.prompt)
        if self.tokenizer is None:
            raise ValueError("the model folder has no tokenizer, which text prompts need")
        if not self.tokenizer.is_fast:
            raise ValueError("the tokenizer reports no character offsets; a fast one (tokenizer.json) is needed")
        if self.chat and not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: add one to it, or set the config key chat to False")

    def render(self, context: str, question: str) -> str:
        """The prompt as the model sees it, before tokenization."""
        return self.render_messages([{"role": "user", "content": self._fill(context, question)}])

    def render_messages(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a conversation, ready for the model's answer."""
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

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """(token ids, their character ranges). A chat template writes its own special tokens."""
        encoded = self.tokenizer(text, add_special_tokens=not self.chat, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, as `encode` gives them."""
        return self.tokenizer(list(texts), add_special_tokens=not self.chat)["input_ids"]

    def count(self, text: str) -> int:
        """Number of tokens that `encode` gives, in half its time."""
        return self.counts([text], special=not self.chat)[0]

    def counts(self, texts: Sequence[str], *, special: bool) -> list[int]:
        """Number of tokens of each text, with those that the tokenizer puts around a text or without."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # which a tokenizer.json may ask for, and the tokenizer itself turns off
        backend.no_padding()
        return [len(encoding) for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=special)]

    def identity(self) -> str:
        """A hash of the tokenizer, the template and what they are used with."""
        template = self.tokenizer.chat_template if self.chat else None
        tokens = self.tokenizer.backend_tokenizer.to_str()
        return digest([tokens, template, self.prompt, self.chat, dict(self.template_kwargs)])

    def _fill(self, context: str, question: str) -> str:
        return self.prompt.format(context=context, question=question).strip()
