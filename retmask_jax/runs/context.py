"""What every stage of the pipeline needs: the config, its work directory, and what they name."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from retmask_jax.data.builtin_files import path_of
from retmask_jax.data.needles import Case, read_sentences
from retmask_jax.data.prompter import Prompter, make_prompter
from retmask_jax.data.prompts import source_files
from retmask_jax.data.tasks import task_cases
from retmask_jax.evals.perplexity import text_windows
from retmask_jax.generation.language_model import LanguageModel, load, outline
from retmask_jax.hf.checkpoint_files import checkpoint_files, read_config
from retmask_jax.hf.families import ignorable
from retmask_jax.hf.hub import resolve
from retmask_jax.hf.weights import Source, source_of
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.sharding import decoding_mesh, make_mesh, placed
from retmask_jax.runs.recipes import as_json
from retmask_jax.runs.workdir import Workdir, settings_of
from retmask_jax.utils import memory
from retmask_jax.utils.files import digest
from retmask_jax.utils.fingerprints import fingerprint
from retmask_jax.utils.hosts import first_alone, least

_FILE = re.compile(r"text\.file|detect\.scores|tasks\..*\.(needles|haystack)")


@dataclasses.dataclass(frozen=True)
class Context:
    """What every stage needs: the config and its work directory; the model is read when first asked for, and its weights
    by those that ask for `lm`."""

    config: Any
    workdir: Workdir
    _built: dict[str, list[Case]] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def mesh(self) -> Mesh:
        return make_mesh(self.config.mesh)

    @property
    def outline(self) -> LanguageModel:
        """The model's config and tokenizer; its weights are not loaded for it."""
        return self.lm if "lm" in self.__dict__ else self._outline

    @functools.cached_property
    def _outline(self) -> LanguageModel:
        there = {"revision": self.config.revision or None, "ignore": self.config.ignore}
        return outline(self.config.model, **there).with_kernel(self.config.kernel)

    @functools.cached_property
    def folder(self) -> Path:
        """Where the model lies, fetched if need be; looked up once, since a branch of the hub may move meanwhile."""
        return resolve(self.config.model, revision=self.config.revision or None, ignore=self.config.ignore)

    @functools.cached_property
    def lm(self) -> LanguageModel:
        return self.load(self.folder)

    def load(self, path: str | Path, revision: str | None = None) -> LanguageModel:
        """A model as the config wants it: dtype, mesh, kernel; on the mesh for work without gradients.

        Of the attributes that the config ignores, those count that this model's config.json has: it may be another model
        than the config's.
        """
        folder = resolve(path, revision=revision, ignore=self.config.ignore)
        ignore = ignorable(read_config(folder), self.config.ignore)
        return load(folder, self.config.dtype, self.inference_mesh, ignore=ignore).with_kernel(self.config.kernel)

    def inference_mesh(self, model: ModelConfig) -> Mesh:
        """Of the devices of `mesh`, which is training's."""
        return decoding_mesh(self.mesh, model, self.config.dtype, least(memory.capacity()))

    def of(self, lm: LanguageModel) -> "Context":
        """This context for another model; prompts then use that model's tokenizer."""
        other = dataclasses.replace(self)
        other.__dict__.update(lm=lm, _outline=lm.replace(params=None))
        return other

    def release(self) -> None:
        """Hold the model's parameters no longer; they are loaded again when asked for."""
        self.__dict__.pop("lm", None)

    def start_params(self, dtype: str) -> PyTree:
        """The model's parameters in a dtype, on the mesh of training, for a caller that gives them up; this context no longer
        holds any then."""
        lm = self.__dict__.pop("lm", None)
        if lm is not None and dtype == self.config.dtype:
            return placed(lm.config, lm.params, self.mesh)
        del lm  # one at a time
        return load(self.folder, dtype, self.mesh, ignore=self.config.ignore).params

    def source(self) -> Source:
        """Where the model's stored weights lie and in what dtypes, for models that are saved as it is."""
        return source_of(self.folder)

    @functools.cached_property
    def prompter(self) -> Prompter:
        section = self.config.prompt
        kwargs = section.template_kwargs.to_dict()
        templates = section.template, section.plain_template
        return make_prompter(self.outline.tokenizer, *templates, chat=section.chat, template_kwargs=kwargs)

    @functools.cached_property
    def pairs_prompter(self) -> Prompter:
        """The prompter of answers that are sampled and trained on: its template may have other arguments."""
        more = self.config.pairs.template_kwargs.to_dict()
        return dataclasses.replace(self.prompter, template_kwargs=self.prompter.template_kwargs | more)

    def cases(self, task: str, **changes: Any) -> list[Case]:
        """The cases of a task, other settings of which may be changed, such as its seed.

        They are built once for all stages, and for all models whose prompts have the same tokens.
        """
        settings = self.config.tasks[task].to_dict() | changes
        key = digest([self.prompter.identity(), settings])
        if key not in self._built:
            self._built[key] = task_cases(self.prompter, SimpleNamespace(**settings))
        return self._built[key]

    def windows(self, length: int | None = None) -> np.ndarray:
        """Texts of so many tokens; None: as long as the config says."""
        text = self.config.text
        if not text.file:
            raise ValueError("text.file names no file: activity and losses are measured on plain text")
        return text_windows(
            self.outline.tokenizer, read_sentences(path_of(text.file)), length or text.length, text.windows
        )

    def check_files(self) -> None:
        """ValueError for the first data file of the config that does not exist."""
        for name in named_files(settings_of(as_json(self.config))):
            self.data_file(name)
        if self.config.pairs.prompts:
            source_files(self.config.pairs.prompts, path_of)

    def measured(self, what: str, identity: Any) -> Path:
        """The folder, next to those of the stages, of values that stages share, by all that these depend on."""
        return self.workdir.folder("measured") / f"{what}-{digest(identity)}"

    def data_file(self, name: str) -> Path:
        """The path of a data file of the config; ValueError where no such file is there."""
        path = path_of(name)
        if not path.is_file():
            raise ValueError(f"data file {name} of the config does not exist ({path})")
        return path

    def fingerprints(self, names: Iterable[str]) -> dict[str, str]:
        """{data file of the config: its fingerprint}; errors as `data_file`."""
        return {name: fingerprint(self.data_file(name)) for name in sorted(names)}

    @functools.cached_property
    def model_fingerprint(self) -> str:
        """`checkpoint_fingerprint` of the model; its weights are not loaded for it."""
        folder = self.lm.source.folder if "lm" in self.__dict__ else self.folder
        if folder is None:
            raise ValueError("the model was not read from a folder, so its files have no fingerprint: save and load it")
        return checkpoint_fingerprint(folder)


def checkpoint_fingerprint(model: str | Path, ignore: Sequence[str] = ()) -> str:
    """Hash of all files of a model (folder, .gguf file, hub id or "bundled"), fetched if need be; as the first host has it.

    ignore: as of `hub.resolve`.
    """
    folder = resolve(model, ignore=ignore)
    return first_alone(lambda: fingerprint(*checkpoint_files(folder)))


def named_files(settings: Mapping[str, Any]) -> list[str]:
    """The data files that some settings, {key: value}, name; but those of suites and prompts."""
    return sorted({value for key, value in settings.items() if _FILE.fullmatch(key) and value})
