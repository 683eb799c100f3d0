"""LanguageModel: configuration, parameters and tokenizer of one model, loaded from and saved to HF checkpoints."""

import dataclasses
import functools
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Float32, Int, PyTree

from retmask_jax.generation.decode import Generated, generate
from retmask_jax.generation.sampling import ENTROPY, THRESHOLD, ContrastDecoding
from retmask_jax.hf import checkpoint_files, end_tokens, hub, weights
from retmask_jax.hf.families import from_hf, report_ignored
from retmask_jax.hf.gguf.file import is_gguf
from retmask_jax.hf.tokenizer import load_tokenizer
from retmask_jax.hf.wrappers import text_config
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import Interventions
from retmask_jax.model.masking import Masks, normalise
from retmask_jax.model.sharding import mesh_of
from retmask_jax.model.transformer import check_positions, check_tokens, longest_row, next_logits
from retmask_jax.utils.array_types import Lengths, Tokens
from retmask_jax.utils.files import write_json
from retmask_jax.utils.hosts import primary

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model ready to use: config, params (a pytree) and tokenizer (None where the folder has none).

    >>> import retmask_jax as rm
    >>> lm = rm.load("bundled")
    >>> lm.config.n_layers, lm.config.n_heads, lm.params["embed"]["embedding"].shape
    (4, 8, (354, 128))
    """

    config: ModelConfig
    params: PyTree
    tokenizer: Any
    source: weights.Source

    def logits(
        self,
        tokens: Tokens,
        lengths: Lengths | None = None,
        interventions: Interventions | None = None,
        positions: Int[ArrayLike, "B P"] | None = None,
    ) -> Float32[jax.Array, "B T V"] | Float32[jax.Array, "B P V"]:
        """Next-token logits of right-padded tokens i32[B,T], at positions i32[B,P] or at all.

        Jitted: one program per shape, whatever the mask. Errors as in `forward`.

        Returns:
            f32[B,T,V], or f32[B,P,V] for the positions asked for.

        >>> import retmask_jax as rm
        >>> lm = rm.load("bundled")
        >>> tokens = lm.tokenizer(["<bos> the home of emma : rome . the home of emma :"])["input_ids"]
        >>> logits = lm.logits(tokens)
        >>> logits.shape, lm.tokenizer.convert_ids_to_tokens(int(logits[0, -1].argmax()))
        ((1, 13, 354), 'rome')
        """
        tokens = check_tokens(self.config, tokens, lengths)
        positions = check_positions(positions, tokens)
        masks = normalise(self.config, interventions, len(tokens))
        lengths = lengths if self.config.depends_on_length else None  # else they change nothing but the program
        with mesh_of(self.params):
            return _logits(self.config, self.params, tokens, lengths, masks, positions)

    def generate(
        self,
        tokens: Tokens,
        lengths: Lengths,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Int[ArrayLike, " B"] = 0,
        interventions: Interventions | None = None,
        stop_ids: Sequence[int] | None = None,
        contrast: Interventions | None = None,
        alpha: float | str | None = None,
        threshold: float | None = None,
    ) -> Generated:
        """Continue right-padded prompts i32[B,T] of the given lengths i32[B] by up to max_new_tokens, N.

        More in `retmask_jax.generation.decode.generate`.

        Args:
            temperature: 0 is greedy.
            seed: One integer, or i32[B].
            stop_ids: None: the model's EOS ids; (): never stop.
            contrast: What is masked in a second pass, whose predictions tokens are chosen away from (DeCoRe, arXiv
                2410.18860): by (1 + alpha) log p - alpha log q, where p and q are the next-token distributions under
                `interventions` and under `contrast`, among tokens whose p is at least `threshold` times the largest.
            alpha: A number of at least 0 (0: plain decoding), or None or "entropy": the entropy of p in nats, at each step.
            threshold: From 0 (all tokens) to 1; None: 0.1. All three are described in
                `retmask_jax.generation.sampling.ContrastDecoding`.

        Returns:
            tokens i32[B,N], pad ids after a stop id, and lengths i32[B], the stop id not counted.

        Raises:
            ValueError: A wrong shape, a length of 0, a prompt that leaves no room, or alpha or threshold without contrast.

        >>> import retmask_jax as rm
        >>> lm = rm.load("bundled")
        >>> tokens = lm.tokenizer(["<bos> the home of emma : rome . the home of emma :"])["input_ids"]
        >>> masks = [None, rm.mask_heads(lm.config, [(1, 0), (1, 1), (1, 2), (1, 3)])]
        >>> outs = [lm.generate(tokens, [13], max_new_tokens=2, interventions=mask) for mask in masks]
        >>> [lm.tokenizer.decode(out.tokens[0].tolist()) for out in outs]  # reads the context, then remembers
        ['rome .', 'moscow .']
        >>> out = lm.generate(tokens, [13], max_new_tokens=2, contrast=masks[1], alpha=0.5)
        >>> lm.tokenizer.decode(out.tokens[0].tolist())  # away from what it remembers
        'rome .'
        """
        return generate(
            self.config,
            self.params,
            tokens,
            lengths,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            interventions=interventions,
            stop_ids=stop_ids,
            contrast=_contrast(contrast, alpha, threshold),
        )

    def with_kernel(self, kernel: str) -> "LanguageModel":
        """The same model with another attention kernel ("auto", "plain", "blocked", "cudnn" or "splash").

        >>> import retmask_jax as rm
        >>> rm.load("bundled").with_kernel("blocked").config.kernel
        'blocked'
        """
        return self.replace(config=dataclasses.replace(self.config, kernel=kernel))

    def replace(self, **changes: Any) -> "LanguageModel":
        """A copy with other params (or any other field).

        >>> import jax, retmask_jax as rm
        >>> lm = rm.load("bundled")
        >>> halved = lm.replace(params=jax.tree.map(lambda x: x / 2, lm.params))
        >>> float(halved.params["norm"]["scale"][0] / lm.params["norm"]["scale"][0])
        0.5
        """
        return dataclasses.replace(self, **changes)


def load(
    path_or_hub_id: str | os.PathLike,
    dtype: str = "float32",
    mesh: Mesh | Callable[[ModelConfig], Mesh] | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    ignore: Sequence[str] = (),
) -> LanguageModel:
    """Load an HF checkpoint: a local folder, a hub id such as "meta-llama/Llama-3.2-1B", or "bundled"; or a GGUF file, whose
    quantised weights are dequantised.

    Of a checkpoint that also reads images, such as "google/gemma-3-4b-it", the language model alone is loaded.

    config.eos_ids are all ids that end an answer: those of config.json and generation_config.json or of the GGUF file, of the
    tokenizer and of the chat template's assistant turns.

    Args:
        dtype: Of the parameters and the computation.
        mesh: Where the parameters are placed by the sharding rules; or a function that gives a mesh for the model's config.
        revision, token, cache_dir: For a hub id, see `retmask_jax.hf.hub.resolve`.
        ignore: Names of attributes of config.json that are not understood, and of which you know that they do not change
            the forward pass. Without it they raise an error that names them.

    Raises:
        ValueError: A missing folder, a model that the hub does not give out, an unsupported model or a damaged file; or a
            name to ignore that config.json does not have, or that is understood.

    >>> import retmask_jax as rm
    >>> lm = rm.load("bundled", dtype="bfloat16")
    >>> lm.tokenizer("the home of emma :")["input_ids"], str(lm.params["norm"]["scale"].dtype)
    ([142, 144, 145, 23, 140], 'bfloat16')
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    folder = hub.resolve(path_or_hub_id, revision=revision, token=token, cache_dir=cache_dir, ignore=ignore)
    texts = _outline(folder, ignore)
    _, params, source = weights.read(folder, dtype, mesh, ignore)
    return texts.replace(params=params, source=source)


def outline(
    path_or_hub_id: str | os.PathLike, *, revision: str | None = None, ignore: Sequence[str] = ()
) -> LanguageModel:
    """A model without weights, which are neither read nor fetched: config and tokenizer; params is None.

    Arguments and errors as for `load`.

    >>> lm = outline("bundled")
    >>> lm.config.n_layers, lm.params
    (4, None)
    """
    return _outline(hub.config_folder(path_or_hub_id, revision=revision, ignore=ignore), ignore)


def save(
    lm: LanguageModel, folder: str | os.PathLike, interventions: Interventions | None = None, dtype: str | None = None
) -> None:
    """Write an HF checkpoint that transformers and other tools load.

    A weight that was not changed is written as it is stored in the model's folder, whatever dtype it was loaded in, so that
    an untouched model saves back bit for bit; should the folder be gone, it is written as it was loaded, with a warning.
    Adapters (`config.lora`) are merged in float32, then rounded to the stored dtype. A language model that was loaded out of a
    checkpoint that also reads images is written as a checkpoint of text alone.

    Args:
        interventions: A shared bool head_mask is baked in (its columns of o_proj become zero).
        dtype: None keeps the stored dtype of each tensor.

    Raises:
        ValueError: Float, per-row and rotary masks cannot be baked in.

    >>> import retmask_jax as rm
    >>> lm = rm.load("bundled")
    >>> rm.save(lm, "without", rm.mask_heads(lm.config, [(1, 0)]))
    >>> kernel = rm.load("without").params["blocks"]["0"]["attn"]["o"]["kernel"]  # [L, H * D, E]
    >>> bool((kernel[1, :32] == 0).all()), bool((kernel[1, 32:] == 0).any())
    (True, False)
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    folder = Path(folder)
    weights.write(folder, lm.config, lm.params, lm.source, _bakeable(lm.config, interventions), dtype)
    if primary():
        _save_texts(lm, folder)


def from_params(config: ModelConfig, params: PyTree, tokenizer: Any = None) -> LanguageModel:
    """A LanguageModel around parameters made here.

    `save` writes it in the format of a family that can express it, see `families.to_hf`.

    >>> import jax, retmask_jax as rm
    >>> lm = rm.load("bundled")
    >>> averaged = jax.tree.map(lambda x, y: (x + y) / 2, lm.params, lm.params)  # of two training runs, say
    >>> rm.save(rm.from_params(lm.config, averaged, lm.tokenizer), "averaged")
    >>> rm.load("averaged").config == lm.config
    True
    """
    return LanguageModel(config, params, tokenizer, weights.Source(None, {}))


def _outline(folder: Path, ignore: Sequence[str]) -> LanguageModel:
    hf_config = text_config(checkpoint_files.read_config(folder))
    config = from_hf(hf_config, ignore)
    report_ignored(folder, tuple(ignore))
    tokenizer = load_tokenizer(folder)
    stops = end_tokens.named_stops(folder, tokenizer)
    config = dataclasses.replace(config, eos_ids=end_tokens.union(config.eos_ids, *stops.values()))
    return LanguageModel(config, None, tokenizer, weights.Source(hf_config, {}, folder))


def _save_texts(lm: LanguageModel, folder: Path) -> None:
    """Write the files of the source's tokenizer, templates and generation settings.

    Where the source has none, or some are links to other folders, the tokenizer is written as it was loaded; for a GGUF file,
    so are the ids that end an answer.
    """
    own, links = ([], []) if lm.source.folder is None else checkpoint_files.own_texts(Path(lm.source.folder))
    for path in links:
        log.warning("%s is a link out of the model's folder, to %s, and is not copied", path, path.resolve())
    if lm.tokenizer is not None and (links or not own):
        with tempfile.TemporaryDirectory() as made:
            lm.tokenizer.save_pretrained(made)
            checkpoint_files.copy_files(checkpoint_files.texts(Path(made)), folder)
    checkpoint_files.copy_files(own, folder)
    if lm.source.folder is not None and is_gguf(Path(lm.source.folder)):
        write_json(folder / end_tokens.GENERATION_CONFIG, {"eos_token_id": list(lm.config.eos_ids)})


def _contrast(
    interventions: Interventions | None, alpha: float | str | None, threshold: float | None
) -> ContrastDecoding | None:
    """The contrast that the arguments of `LanguageModel.generate` describe."""
    if interventions is None:
        if alpha is not None or threshold is not None:
            raise ValueError(f"alpha is {alpha} and threshold {threshold} without contrast: give what to contrast with")
        return None
    return ContrastDecoding(
        interventions, ENTROPY if alpha is None else alpha, THRESHOLD if threshold is None else threshold
    )


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    config: ModelConfig,
    params: PyTree,
    tokens_BT: jax.Array,
    lengths_B: jax.Array | None,
    masks: Masks,
    positions_BP: jax.Array | None,
) -> jax.Array:
    return next_logits(config, params, tokens_BT, masks, longest_row(tokens_BT, lengths_B), positions_BP)


def _bakeable(config: ModelConfig, interventions: Interventions | None) -> np.ndarray | None:
    """The shared bool head mask as an array, or None; ValueError for interventions that weights cannot express."""
    if interventions is None:
        return None
    masks = normalise(config, interventions)
    head_mask = masks.head_BLH if interventions.head_mask is None else np.asarray(interventions.head_mask)
    if head_mask.dtype != np.bool_ or interventions.has_rows:
        raise ValueError(
            f"only a shared bool head_mask can be baked into weights, this is {head_mask.dtype}{head_mask.shape}"
        )
    if np.any(masks.rope_BLHR):
        raise ValueError("a rotary mask cannot be baked into weights: save without it and apply it at run time")
    if masks.streams is not None:
        raise ValueError("streaming heads cannot be baked into weights: save without them and apply them at run time")
    if np.any(masks.query_BLH):
        raise ValueError("a query mask cannot be baked into weights: save without it and apply it at run time")
    if interventions.head_mean is not None:
        raise ValueError("a head's mean cannot be baked into weights: save without it and apply it at run time")
    return np.asarray(masks.head_BLH[0])
