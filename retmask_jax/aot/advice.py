"""What to change in a training step that does not fit a topology, or leaves much of its memory unused."""

import dataclasses
import math
from collections.abc import Mapping

from retmask_jax.aot.topology import GIB


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step and its memory.

    batch, microbatch: pairs. mesh: {axis: chips}. needed, limit: bytes per chip. fixed: the part of `needed` that no
    smaller microbatch saves (weights, gradients, moments). lora: only adapters are trained. narrow_moment: Adam's first
    moment is kept in bfloat16.
    """

    batch: int
    microbatch: int
    remat: bool
    mesh: Mapping[str, int]
    needed: float
    fixed: float
    limit: float
    lora: bool = False
    narrow_moment: bool = False

    @property
    def shards(self) -> int:
        """Number of chips over which rows are split."""
        return self.mesh["data"] * self.mesh["fsdp"]

    @property
    def chips(self) -> int:
        """Number of chips of the mesh."""
        return math.prod(self.mesh.values())

    def divides(self, microbatch: int) -> bool:
        """Whether the batch divides into microbatches of this size, and each of them over the chips."""
        return self.batch % microbatch == 0 and microbatch % self.shards == 0


def advise(step: Step, fits: bool) -> list[str]:
    """Alternative changes, the best one first; none where the step fits and uses the chips' memory."""
    if fits:
        return _use_room(step)
    return _split_weights(step) if step.fixed > step.limit else _shrink_activations(step)


def _use_room(step: Step) -> list[str]:
    # How much activations grow is not known exactly, so some memory is left free.
    room = 0.8 * (step.limit - step.fixed) / max(step.needed - step.fixed, 1)
    larger = [n for n in range(step.microbatch + 1, step.batch + 1) if step.divides(n) and n <= room * step.microbatch]
    if not larger:
        return []
    return [f"there is room for train.microbatch_size={max(larger)}, with which weights are moved less often"]


def _split_weights(step: Step) -> list[str]:
    what = f"weights, gradients and moments alone take {step.fixed / GIB:.1f} of {step.limit / GIB:.1f} GiB per chip"
    if step.mesh["data"] > 1:
        return [f"{what}: set mesh.data=1 and mesh.fsdp=-1, which splits them over all chips"]
    # Part of the memory must be left for activations.
    chips = 2 ** math.ceil(math.log2(step.chips * step.fixed / (0.8 * step.limit)))
    changes = [f"{what}: use a topology of at least {chips} such chips, with mesh.fsdp=-1"]
    # A weight takes 16 bytes with its gradient and moments; the narrow moment saves two of them.
    if not (step.lora or step.narrow_moment) and step.fixed * 14 / 16 < 0.9 * step.limit:
        changes.append("set train.first_moment_dtype=bfloat16")
    return changes if step.lora else [*changes, "train adapters, train.lora_rank=16"]


def _shrink_activations(step: Step) -> list[str]:
    changes = [] if step.remat else ["set train.remat=True"]
    share = (step.limit - step.fixed) / max(step.needed - step.fixed, 1)
    smaller = [n for n in range(1, step.microbatch) if step.divides(n)]
    fitting = [n for n in smaller if n <= share * step.microbatch]
    if smaller:
        about = "" if fitting else ", the smallest, which may still be too much"
        changes.append(f"set train.microbatch_size={max(fitting) if fitting else min(smaller)}{about}")
    elif step.mesh["fsdp"] % 2 == 0:
        mesh = f"mesh.fsdp={step.mesh['fsdp'] // 2} and mesh.tensor={2 * step.mesh['tensor']}"
        changes.append(f"set {mesh}, then train.microbatch_size={max(1, step.microbatch // 2)}")
    return changes or ["lower train.max_tokens, or use more chips"]
