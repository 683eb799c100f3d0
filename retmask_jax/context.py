"""What every stage of the pipeline needs: the config, its work directory, and what they name."""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from jax.sharding import Mesh

from retmask_jax import memory
from retmask_jax.data.prompts import source_files
from retmask_jax.evals.perplexity import text_windows
from retmask_jax.evals.recall import task_cases
from retmask_jax.files import digest
from retmask_jax.haystack import Prompter, read_sentences
from retmask_jax.hosts import least
from retmask_jax.hub import BUNDLED
from retmask_jax.lm import LanguageModel, load
from retmask_jax.model.config import ModelConfig
from retmask_jax.sharding import decoding_mesh, make_mesh, placed
from retmask_jax.workdir import Workdir, fingerprint


@dataclasses.dataclass(frozen=True)
class Context:
    """What every stage needs: the config and its work directory; the model is loaded when first asked for."""

    config: Any
    workdir: Workdir

    @functools.cached_property
    def mesh(self):
        return make_mesh(self.config.mesh)

    @functools.cached_property
    def lm(self) -> LanguageModel:
        return self.load(self.config.model, revision=self.config.revision or None)

    def load(self, path, **options) -> LanguageModel:
        """A model as the config wants it: dtype, mesh, kernel; on the mesh for work without gradients."""
        return load(path, self.config.dtype, self.inference_mesh, **options).with_kernel(self.config.kernel)

    def inference_mesh(self, model: ModelConfig) -> Mesh:
        """Of the devices of `mesh`, which is training's."""
        return decoding_mesh(self.mesh, model, self.config.dtype, least(memory.capacity()))

    def of(self, lm: LanguageModel) -> "Context":
        """The same for another model, with its own tokenizer."""
        other = dataclasses.replace(self)
        other.__dict__["lm"] = lm
        return other

    def release_params(self):
        """The model's parameters on the mesh of training, which this context then no longer holds; it loads them again
        when asked."""
        lm = self.__dict__.pop("lm", None) or self.load(self.config.model, revision=self.config.revision or None)
        return placed(lm.config, lm.params, self.mesh)

    @functools.cached_property
    def prompter(self) -> Prompter:
        section = self.config.prompt
        return Prompter(self.lm.tokenizer, section.template, section.chat, section.template_kwargs.to_dict())

    @functools.cached_property
    def pairs_prompter(self) -> Prompter:
        """The prompter of answers that are sampled and trained on: its template may have other arguments."""
        more = self.config.pairs.template_kwargs.to_dict()
        return dataclasses.replace(self.prompter, template_kwargs=self.prompter.template_kwargs | more)

    def resolve(self, name: str) -> Path:
        """A data file of the config; "bundled/..." is in the package."""
        return BUNDLED.parent / "data" / name.removeprefix("bundled/") if name.startswith("bundled/") else Path(name)

    def cases(self, task: str, **changes):
        """The cases of a task, other settings of which may be changed, such as its seed."""
        section = SimpleNamespace(**self.config.tasks[task].to_dict() | changes)
        return task_cases(self.prompter, section, self.resolve)

    def heads(self) -> list[tuple[int, int]]:
        return [tuple(head) for head in self.workdir.result("detect")["heads"]]

    def windows(self) -> np.ndarray:
        text = self.config.text
        if not text.file:
            raise ValueError("text.file names no file: activity and losses are measured on plain text")
        return text_windows(self.lm.tokenizer, read_sentences(self.resolve(text.file)), text.length, text.windows)

    def inputs(self) -> dict[str, Any]:
        """Fingerprints of the model and data files a run reads; ValueError for one that is missing."""
        config = self.config
        files = {config.text.file} if config.text.file else set()
        for task in config.tasks.values():
            files |= {name for name in (task.needles, task.haystack) if name}
        if config.detect.scores is not None:
            files.add(config.detect.scores)
        prints = self.fingerprints(files)
        if config.pairs.prompts:
            found = source_files(config.pairs.prompts, self.resolve)
            prints[config.pairs.prompts] = digest([fingerprint(file) for file in found])
        return {"model": str(config.model), "weights": self.model_fingerprint(), "files": prints, "seed": config.seed}

    def data_file(self, name: str) -> Path:
        """`resolve`d; ValueError where no such file is there."""
        path = self.resolve(name)
        if not path.is_file():
            raise ValueError(f"data file {name} of the config does not exist ({path})")
        return path

    def fingerprints(self, names: Iterable[str]) -> dict[str, str]:
        """{data file of the config: its fingerprint}; errors as `data_file`."""
        return {name: fingerprint(self.data_file(name)) for name in sorted(names)}

    def model_fingerprint(self) -> str:
        return self._model_fingerprint

    @functools.cached_property
    def _model_fingerprint(self) -> str:
        """Kept, so that a stage which has released the model need not load it again to tell."""
        return fingerprint(self.lm.source.folder)
