"""What ends an answer in published chat models, and tokenizers with the same special tokens, ids and structure of turns.

Ids, EOS tokens and generation_config.json are those that public copies of the models' files show. The templates are
written here, as short as can be, with each family's turns: its markers, the order of what it writes, whether it trims,
refuses a system turn or drops thoughts. They are not the published templates; `tests/hf/test_end_tokens.py` also takes those
that TRL ships, where it is installed.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from hub_configs import CONFIGS
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

WORDS = ("<unk>", "answer", "question", "system", "user", "assistant", "model", "the", "short", "long", ".")


@dataclasses.dataclass(frozen=True)
class Chat:
    """special: token -> id. eos: the tokenizer's. generation: eos_token_id of generation_config.json (None: no such file).

    stop_ids: expected, in order; row_end: expected. published: TRL's name of the published template, where it has it.
    """

    config: dict[str, Any]
    special: dict[str, int]
    eos: str
    generation: Any
    template: str
    stop_ids: tuple[int, ...]
    row_end: int
    published: str = ""

    def tokenizer(self, template: str | None = None):
        """A tokenizer of few words whose special tokens have these very ids."""
        vocabulary = {word: i + 10 for i, word in enumerate(WORDS)} | self.special
        words = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
        words.pre_tokenizer = WhitespaceSplit()
        made = transformers.PreTrainedTokenizerFast(
            tokenizer_object=words,
            eos_token=self.eos,
            pad_token=self.eos,
            unk_token="<unk>",
            extra_special_tokens=[token for token in self.special if token != self.eos],
            chat_template=template or self.template,
        )
        assert {token: made.convert_tokens_to_ids(token) for token in self.special} == self.special
        return made

    def save(self, folder: Path) -> Path:
        """The folder with config.json, generation_config.json and the tokenizer; no weights."""
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config))
        if self.generation is not None:
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": self.generation}))
        self.tokenizer().save_pretrained(folder)
        return folder


_ROUNDS = "{% for m in messages %}"
_LLAMA = (
    "{{ '<|begin_of_text|>' }}{% if messages[0].role != 'system' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\n' + strftime_now('%d %b %Y') + '<|eot_id|>' }}{% endif %}"
    + _ROUNDS
    + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_CHATML = (
    _ROUNDS + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN3 = (  # thoughts of earlier turns are dropped, the last answer gets an empty thought where it has none
    _ROUNDS + "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' + said }}"
    "{% elif m.role == 'assistant' %}{{ said }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def _olmo3(opening: str) -> str:
    """The last answer ends with EOS, earlier ones with <|im_end|>."""
    return (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n' + 'short .' + '<|im_end|>\n' }}{% endif %}"
        + _ROUNDS
        + "{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% if m.role == 'assistant' and loop.last %}{{ eos_token }}{% else %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n" + opening + "' }}{% endif %}"
    )


_GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    + _ROUNDS
    + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_PHI = (  # EOS after the whole conversation
    _ROUNDS + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

_LLAMA_SPECIAL = {
    "<|begin_of_text|>": 128000,
    "<|end_of_text|>": 128001,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eom_id|>": 128008,
    "<|eot_id|>": 128009,
}
_LLAMA_STOPS = (128001, 128008, 128009)
_CHATML_SPECIAL = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
_OLMO_SPECIAL = {"<|endoftext|>": 100257, "<|im_start|>": 100264, "<|im_end|>": 100265, "<|pad|>": 100277}
_SMOLLM2 = CONFIGS["meta-llama/Llama-2-7b-hf"] | {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "rope_interleaved": None,
}

CHATS = {
    "Llama-3.1-8B-Instruct": Chat(
        CONFIGS["meta-llama/Llama-3.1-8B-Instruct"],
        _LLAMA_SPECIAL,
        "<|eot_id|>",
        list(_LLAMA_STOPS),
        _LLAMA,
        _LLAMA_STOPS,
        128009,
        "llama3_1",
    ),
    "Llama-3.2-1B-Instruct": Chat(
        CONFIGS["meta-llama/Llama-3.2-1B-Instruct"],
        _LLAMA_SPECIAL,
        "<|eot_id|>",
        list(_LLAMA_STOPS),
        _LLAMA,
        _LLAMA_STOPS,
        128009,
        "llama3_2",
    ),
    "Qwen3-8B": Chat(
        CONFIGS["Qwen/Qwen3-8B"],
        _CHATML_SPECIAL,
        "<|im_end|>",
        [151645, 151643],
        _QWEN3,
        (151645, 151643),
        151645,
        "qwen3",
    ),
    "Olmo-3-7B-Instruct": Chat(
        CONFIGS["allenai/Olmo-3-7B-Instruct"],
        _OLMO_SPECIAL,
        "<|endoftext|>",
        [100265, 100257],
        _olmo3(""),
        (100257, 100265),
        100257,
    ),
    "Olmo-3-7B-Think": Chat(
        CONFIGS["allenai/Olmo-3-7B-Think"],
        _OLMO_SPECIAL,
        "<|endoftext|>",
        [100265, 100257],
        _olmo3("<think>"),
        (100257, 100265),
        100257,
    ),
    "gemma-3-1b-it": Chat(
        CONFIGS["google/gemma-3-1b-it"],
        {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<start_of_turn>": 105, "<end_of_turn>": 106},
        "<eos>",
        [1, 106],
        _GEMMA,
        (1, 106),
        106,
        "gemma3",
    ),
    "Phi-3.5-mini-instruct": Chat(
        CONFIGS["microsoft/Phi-3.5-mini-instruct"],
        {"<|endoftext|>": 32000, "<|assistant|>": 32001, "<|system|>": 32006, "<|end|>": 32007, "<|user|>": 32010},
        "<|endoftext|>",
        [32007, 32001, 32000],
        _PHI,
        (32000, 32007, 32001),
        32007,
        "phi3_5",
    ),
    "SmolLM2-135M-Instruct": Chat(
        _SMOLLM2, {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}, "<|im_end|>", 2, _CHATML, (2,), 2
    ),
    "Qwen2.5-7B": Chat(  # a base model whose tokenizer has a template: it stops at its turn's end, too
        CONFIGS["Qwen/Qwen2.5-7B"],
        _CHATML_SPECIAL,
        "<|endoftext|>",
        151643,
        _CHATML,
        (151643, 151645),
        151645,
        "qwen2_5",
    ),
}
RETMASK = ("Llama-3.1-8B-Instruct", "Qwen3-8B", "Olmo-3-7B-Instruct", "Olmo-3-7B-Think")
