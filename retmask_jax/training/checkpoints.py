"""Checkpoints of a training run: written in the background, read onto any mesh; the newest few and the best one are
kept."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax

from retmask_jax.utils.files import digest, read_json, wait_until_listed, write_json
from retmask_jax.utils.store import check_identity

log = logging.getLogger(__name__)


_LAST = "commit_success.txt"  # the file of a checkpoint that Orbax writes last


class Checkpoints:
    """The checkpoints in a folder, to be used in a `with` statement: at its end all of them are complete."""

    def __init__(self, folder: str | os.PathLike[str], keep: int, identity: Mapping[str, Any]):
        """Opens the checkpoints of a folder.

        A checkpoint is complete once its folder holds the file that is written last: no folder is renamed, which object
        stores and their mounts cannot do. Since mounts may list new folders late, the steps are also noted by name.

        Args:
            folder: A path, or the address of a bucket (gs://...), which is handed on as it is.
            keep: How many of the newest checkpoints stay, besides the one with the lowest loss.
            identity: What the run is made from, {name: JSON value}.
        """
        import orbax.checkpoint as ocp
        from etils import epath
        from orbax.checkpoint import checkpoint_managers as kept

        logging.getLogger("absl").setLevel(logging.WARNING)
        self._identity = dict(identity)
        best = kept.BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=1)
        policy = kept.AnyPreservationPolicy([kept.LatestN(keep), best])
        options = ocp.CheckpointManagerOptions(
            create=True, preservation_policy=policy, temporary_path_class=ocp.path.atomicity.CommitFileTemporaryPath
        )
        local = None if "://" in str(folder) else Path(folder).absolute()
        self._note = None if local is None else local.with_name(f"{local.name}.steps")
        if local is not None and self._note is not None and self._note.exists():
            begun = [local / str(step) for step in read_json(self._note)]
            wait_until_listed(path for path in begun if (path / _LAST).exists())
        self._manager = ocp.CheckpointManager(epath.Path(local or str(folder)), options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def save(self, step: int, state: Any, data: dict, loss: float) -> None:
        """Starts to write a checkpoint.

        Args:
            data: The state of the iterator over the data.
            loss: Mean loss since the last checkpoint, by which the best one is chosen.
        """
        import orbax.checkpoint as ocp

        about = {"data": data, "identity": self._identity, "loss": loss}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
        if self._note:
            steps = self._manager.all_steps()
            write_json(self._note, [*steps, step])
            # Saving deletes earlier checkpoints, for which all of their files must be listed.
            wait_until_listed(Path(self._manager.directory) / str(earlier) / _LAST for earlier in steps)
        self._manager.save(step, args=args, metrics={"loss": loss}, force=True)

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def restore(self, shapes: Any) -> tuple[Any, dict]:
        """Returns the state of training and the state of the data's iterator from the newest checkpoint.

        Args:
            shapes: Shapes and shardings of the state, which need not be those it was written with.

        Raises:
            ValueError: There is no checkpoint, or its run has another identity.
        """
        import orbax.checkpoint as ocp

        step = self.latest
        if step is None:
            raise ValueError(f"{self._manager.directory} holds no checkpoint")
        about = self._about(step)
        wanted = self._identity
        if "fingerprint" in about:  # earlier versions stored a hash of the identity under this name
            about, wanted = about | {"identity": {"input": about["fingerprint"]}}, {"input": digest(wanted)}
        check_identity(self._manager.directory, about["identity"], wanted)
        log.info("resuming at step %d", step)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(jax.tree.map(_abstract, shapes)))
        return self._manager.restore(step, args=args)["state"], about["data"]

    def _about(self, step: int) -> dict:
        import orbax.checkpoint as ocp

        return self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]


def _abstract(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
