"""Preference pairs as a TFDS set of ArrayRecord files: made and read at random without TensorFlow."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.data.released import write_released

NAME = "retmask_pairs"
FORMATS = ("released", "tfds")

_VERSIONS = ("1.1.0", "1.0.0")  # the one that is written, and an older one without stop ids that is read
_TEXTS = ("id", "messages", "chosen", "rejected")
_FLAGS = ("chosen_finished", "rejected_finished")
_STOPS = ("chosen_stop", "rejected_stop")  # ids that ended the answers
_NO_STOP = -1


@dataclasses.dataclass(frozen=True)
class PreferenceSource:
    """Pairs by number, as `grain.MapDataset.source` takes them; stored: the TFDS source of them."""

    stored: Sequence[dict]

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, number: int) -> dict[str, Any]:
        example = self.stored[number]
        texts = {name: example[name].decode() for name in _TEXTS}
        flags = {name: bool(example[name]) for name in _FLAGS}
        stops = {name: int(example[name]) for name in _STOPS if example.get(name, _NO_STOP) != _NO_STOP}
        return texts | flags | {"messages": json.loads(texts["messages"])} | stops


def export_pairs(records: Iterable[dict], out: str | Path, format: str) -> None:
    """Write pairs of `read_pairs`: "released" to a JSONL file (see `write_released`), "tfds" into a folder."""
    if format not in FORMATS:
        raise ValueError(f"pairs are not written as {format!r}: choose {' or '.join(FORMATS)}")
    write = write_released if format == "released" else build_dataset
    write(out, records)


def build_dataset(folder: str | Path, records: Iterable[dict]) -> None:
    """Make the TFDS set `retmask_pairs` in a folder, pair i of the records as its item i.

    `preference_source(folder)` reads it, and so does tfds.data_source("retmask_pairs", split="train",
    data_dir=folder). Raises ValueError if the folder has such a set.
    """
    if (Path(folder) / NAME).exists():
        raise ValueError(f"{folder} has pairs already ({NAME}/): name another folder, or remove them")
    _builder(folder, records).download_and_prepare()


def preference_source(folder: str | Path) -> PreferenceSource:
    """The pairs of a folder that `build_dataset` filled; ValueError if there are none."""
    import tensorflow_datasets as tfds

    paths = [path for version in _VERSIONS if (path := Path(folder) / NAME / version).is_dir()]
    if not paths:
        raise ValueError(f"{folder} has no pairs ({NAME}/{_VERSIONS[0]}/): export them with the format tfds")
    return PreferenceSource(tfds.builder_from_directory(paths[0]).as_data_source("train"))


def _builder(folder: str | Path, records: Iterable[dict]):
    import tensorflow_datasets as tfds

    # Not registered: TFDS then reads the set from its files, wherever this package is not installed as well.
    class RetmaskPairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(_VERSIONS[0])

        def _info(self):
            text, flag, stop = tfds.features.Text(), tfds.features.Scalar(np.bool_), tfds.features.Scalar(np.int64)
            features = dict.fromkeys(_TEXTS, text) | dict.fromkeys(_FLAGS, flag) | dict.fromkeys(_STOPS, stop)
            return tfds.core.DatasetInfo(
                builder=self, description="Preference pairs: a model's answer and that of its ablated form.",
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,  # item i is pair i
            )  # fmt: skip

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, record in enumerate(records):
                # As JSON text a conversation comes back as it was; TFDS turns a list of turns into two lists.
                messages = json.dumps(record["messages"], ensure_ascii=False)
                stops = {name: record.get(name, _NO_STOP) for name in _STOPS}
                yield number, {name: record[name] for name in (*_TEXTS, *_FLAGS)} | {"messages": messages} | stops

    return RetmaskPairs(data_dir=folder, file_format="array_record")
