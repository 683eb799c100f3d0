"""The tensors of a GGUF file under the names of Hugging Face, dequantised as they are read."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from retmask_jax.hf.gguf.config import kv_heads
from retmask_jax.hf.gguf.file import FLOATS, Block, GgufFile
from retmask_jax.hf.gguf.keys import Keys
from retmask_jax.hf.gguf.rope import ROPE_TENSORS

# --- names: GGUF's -> Hugging Face's; what stands before .weight and .bias, for layers after their number ---

_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_FUSED = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_BOTH_NORMS = _POST_NORMS | {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How the tensors of an architecture are stored.

    Attributes:
        names: Those of a layer's tensors.
        interleaved: Whether the rows of q and k are in the order in which the two dimensions of a rotary pair are
            neighbours.
        norm_offset: What was added to the weights of norms.
    """

    names: Mapping[str, str]
    interleaved: bool = False
    norm_offset: float = 0.0


_LAYOUTS = {
    "llama": _Layout(_ATTENTION | _MLP | _PRE_NORMS, interleaved=True),
    "qwen2": _Layout(_ATTENTION | _MLP | _PRE_NORMS),
    "qwen3": _Layout(_ATTENTION | _MLP | _PRE_NORMS | _QK_NORMS),
    "olmo2": _Layout(_ATTENTION | _MLP | _POST_NORMS | _QK_NORMS),
    "gemma2": _Layout(_ATTENTION | _MLP | _BOTH_NORMS, norm_offset=1.0),
    "gemma3": _Layout(_ATTENTION | _MLP | _BOTH_NORMS | _QK_NORMS, norm_offset=1.0),
    "phi3": _Layout(_FUSED | _PRE_NORMS),
}


class GgufTensor:
    """A tensor as Hugging Face stores it; its rows are read and dequantised when they are asked for.

    Attributes:
        shape: Its shape, rows first.
        dtype: That of a float tensor as stored, "float32" of a quantised one.
    """

    def __init__(self, file: GgufFile, block: Block, heads: int | None, offset: float):
        """Args: heads: Number of heads whose rows are interleaved, None for other tensors. offset: Is subtracted."""
        self.shape = block.shape
        self.dtype = "float32" if offset else block.dtype
        self._file, self._block, self._heads, self._offset = file, block, heads, offset

    def read(self, *bounds: tuple[int, int]) -> np.ndarray:
        """Returns the block between these bounds, (begin, end) along each axis."""
        rows, *columns = (slice(begin, end) for begin, end in bounds)
        if self._heads is not None:
            rows = _interleaved(self.shape[0] // self._heads, np.arange(*bounds[0]))
        if not columns:
            return self._values(self._stored())[0, rows]
        return self._values(self._stored()[rows])[:, *columns]

    def _stored(self) -> np.ndarray:
        """The bytes of its rows, u8[rows, bytes of a row]; a vector is one row."""
        block = self._block
        return self._file.data[block.offset : block.offset + block.n_bytes].reshape(-1, block.row_bytes)

    def _values(self, rows: np.ndarray) -> np.ndarray:
        values = _dequantised(rows, self._block.kind)
        return values - np.float32(self._offset) if self._offset else values


def open_tensors(file: GgufFile) -> dict[str, GgufTensor]:
    """Returns the tensors of a file by the names of Hugging Face.

    Raises:
        ValueError: A tensor, which is named, is not understood, or has a type that cannot be dequantised.
    """
    layout = _LAYOUTS[file.architecture]
    blocks = {name: block for name, block in file.blocks.items() if name not in ROPE_TENSORS}
    _check_kinds(file.path, blocks)
    return {_hf_name(file.path, name, layout): _tensor(file, name, block, layout) for name, block in blocks.items()}


def _tensor(file: GgufFile, name: str, block: Block, layout: _Layout) -> GgufTensor:
    heads = None
    if layout.interleaved and ".attn_q." in name:
        heads = Keys(file).size("attention.head_count")
    elif layout.interleaved and ".attn_k." in name:
        heads = kv_heads(Keys(file))
    return GgufTensor(file, block, heads, layout.norm_offset if name.endswith("norm.weight") else 0.0)


def _hf_name(path: Path, name: str, layout: _Layout) -> str:
    stem, _, end = name.rpartition(".")
    if stem in _ENDS and end == "weight":
        return f"{_ENDS[stem]}.weight"
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if found and found[2] in layout.names and end in ("weight", "bias"):
        return f"model.layers.{found[1]}.{layout.names[found[2]]}.{end}"
    raise ValueError(f"{path} has a tensor that is not understood, so the model could be wrong: {name}")


def _check_kinds(path: Path, blocks: Mapping[str, Block]) -> None:
    for kind, (name, block) in {block.kind: (name, block) for name, block in blocks.items()}.items():
        try:
            _dequantised(np.zeros((1, block.row_bytes), np.uint8), kind)
        except NotImplementedError as error:
            raise ValueError(
                f"{path}: tensor {name} has type {kind}, which the package gguf cannot dequantise: use another quantisation"
            ) from error


def _dequantised(rows: np.ndarray, kind: str) -> np.ndarray:
    """The values of rows of bytes; those of floats as they are."""
    import ml_dtypes
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    if kind in FLOATS:
        return rows.view(ml_dtypes.bfloat16 if kind == "BF16" else FLOATS[kind])
    return dequantize(rows, GGMLQuantizationType[kind])


def _interleaved(width: int, rows: np.ndarray) -> np.ndarray:
    """Where rows of a projection are stored if the dimensions r and r + R of each head of this width are neighbours."""
    head, dim = np.divmod(rows, width)
    half, pair = np.divmod(dim, width // 2)
    return head * width + 2 * pair + half
