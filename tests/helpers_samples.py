"""Tokenizers, texts and checks for the suites of samples that fill a length."""

import functools

import numpy as np
import tokenizers
import transformers

from retmask_jax.data import tiny_language as tl
from retmask_jax.data.prompter import Prompter
from retmask_jax.evals.suites import samples
from retmask_jax.evals.suites.words import ADJECTIVES, NOISE, NOUNS

TEMPLATE = "{{ bos_token }}USER: {{ messages[0]['content'] | trim }}\nBOT:\n"
ESSAY = [s.capitalize().replace(" .", ".") for s in tl.haystack_text(np.random.default_rng(0), 300)]


@functools.cache
def byte_pairs(vocab_size: int, chat: bool = True, corpus: tuple[str, ...] = ()) -> Prompter:
    """A byte-level BPE tokenizer trained on the word lists, with <s> before a text; chat: and a template."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    model.train_from_iterator(corpus or (*ESSAY, NOISE, " ".join(ADJECTIVES + NOUNS)), trainer)
    model.post_processor = tokenizers.processors.Sequence(
        [
            tokenizers.processors.ByteLevel(trim_offsets=True),
            tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
        ]
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", chat_template=TEMPLATE)
    return Prompter(fast, chat=chat)


def text_of(prompter: Prompter, sample: samples.Sample) -> str:
    return prompter.tokenizer.decode(sample.tokens)


def said_by(prompter: Prompter, sample: samples.Sample) -> list[str]:
    """The text in the span of each needle."""
    return [prompter.tokenizer.decode(sample.tokens[slice(*span)]) for span in sample.spans]
