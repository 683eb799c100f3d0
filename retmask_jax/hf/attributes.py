"""Attributes of a config.json: which of them change nothing, and a reader that refuses those that nothing reads."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Attributes that change nothing in a forward pass, nor in training here, whatever their value.
_INERT: frozenset[str] = frozenset(
    # What transformers' base class writes: about the file, classifiers, what a call returns, how it is computed.
    """_name_or_path name_or_path _commit_hash architectures auto_map model_type dtype torch_dtype transformers_version
    finetuning_task id2label label2id num_labels problem_type classifier_dropout task_specific_params prefix
    tokenizer_class processor_class sep_token_id decoder_start_token_id is_decoder
    return_dict output_attentions output_hidden_states output_past tie_last_hidden_states torchscript use_bfloat16
    tf_legacy_loss chunk_size_feed_forward use_cache cache_implementation attn_implementation _attn_implementation
    _attn_implementation_autoset _attn_implementation_internal _flash_attn_2_enabled experts_implementation
    _experts_implementation _experts_implementation_internal pretraining_tp"""
    # Its settings of generation, which calls give here, and which belong into generation_config.json.
    """ assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty
    do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens
    min_length no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate
    suppress_tokens target_lookbehind temperature top_k top_p typical_p"""
    # Training elsewhere.
    """ attention_dropout embd_pdrop hidden_dropout hidden_dropout_prob initializer_range neftune_noise_alpha
    output_router_logits resid_pdrop router_aux_loss_coef router_jitter_noise"""
    # Other programs that write checkpoints: Nanotron, Transformers.js, Unsloth, and limits that older ones wrote.
    """ is_llama_config max_sequence_length model_max_length model_name transformers.js_config unsloth_fixed
    unsloth_version""".split()
)
# Attributes of the same programs that could change the model. A family that does not read them has only this value.
_AT_DEFAULT: dict[str, Any] = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_causal": True,
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "per_layer_config": {},
    "pruned_heads": {},
    "qk_layer_norms": False,
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
    "use_bidirectional_attention": False,
    "use_sliding_window": False,
}
_QUANTISED = ("quantization_config", "quantization", "compression_config")  # the second is MLX's


class Reader:
    """Hands out the attributes of an HF config and remembers which were asked for."""

    def __init__(self, hf: Mapping[str, Any]):
        self._hf = hf
        self._seen = set(_INERT)

    def get(self, name: str, default: Any = ...) -> Any:
        """Returns an attribute, or the default where it is absent or null; ValueError if there is no default."""
        self._seen.add(name)
        value = self._hf.get(name)
        if value is not None:
            return value
        if default is ...:
            raise ValueError(f"config.json has no {name!r}, which a {self._hf['model_type']} model needs")
        return default

    def size(self, name: str, default: Any = ...) -> Any:
        """Returns an attribute as `get` does; ValueError unless it is a whole number of at least 1."""
        value = self.get(name, default)
        if value is not default and (type(value) is not int or value < 1):
            raise ValueError(f"config.json has {name}={value!r}; it must be a whole number of at least 1")
        return value

    def factor(self, name: str) -> float:
        """Returns an attribute, 1 where it is absent or null; ValueError unless it is a positive number."""
        value = self.get(name, 1.0)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"config.json has {name}={value!r}; it must be a positive number")
        return float(value)

    def expect(self, **supported: Any) -> None:
        """Raises ValueError unless each attribute has the only value that is supported, or is absent."""
        for name, value in supported.items():
            if (found := self.get(name, value)) != value:
                raise ValueError(
                    f"config.json has {name}={found!r}; only {value!r} is supported for {self._hf['model_type']}"
                )

    def ignore(self, *names: str) -> None:
        """Marks attributes as read that do not matter in this family."""
        self._seen |= set(names)

    def settle(self) -> None:
        """Raises ValueError for a quantised checkpoint, and for an attribute of any family that is not at its default."""
        for name in _QUANTISED:
            if found := self.get(name, {}):
                method = found.get("quant_method") if isinstance(found, Mapping) else None
                raise ValueError(
                    f"the checkpoint is quantised ({method or f'{name}={found}'}): use the unquantised one"
                )
        self.expect(**{name: value for name, value in _AT_DEFAULT.items() if name not in self._seen})

    def unread(self) -> list[str]:
        """Returns the names of attributes that were not asked for; those that are null count as absent."""
        return sorted({name for name, value in self._hf.items() if value is not None} - self._seen)

    def finish(self, ignore: Sequence[str] = ()) -> None:
        """Raises ValueError for attributes that were not asked for, other than those to ignore, and for a name to ignore
        that is not one of them."""
        self.settle()
        unread = self.unread()
        for name in ignore:
            if self._hf.get(name) is None:
                raise ValueError(f"config.json has no {name!r}, which is to be ignored: leave it out of `ignore`")
            if name not in unread:
                raise ValueError(
                    f"config.json's {name!r} is understood, so it is not ignored: leave it out of `ignore`"
                )
        if unknown := [name for name in unread if name not in ignore]:
            shown = ", ".join(f"{name}={self._hf[name]!r}" for name in unknown)
            names = tuple([*ignore, *unknown])
            raise ValueError(
                f"config.json has attributes that are not understood, so the model could be wrong: {shown}; if you know "
                f"that they change nothing, pass ignore={names!r} to rm.load, or --config.ignore={_as_flag(names)}"
            )


def _as_flag(names: Sequence[str]) -> str:
    """The names as the value of --config.ignore, as one types it."""
    quoted = ", ".join(f'"{name}"' for name in names)
    return names[0] if len(names) == 1 else f"'({quoted})'"
