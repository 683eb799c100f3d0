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

_VERSION = "1.0.0"
_TEXTS = ("id", "messages", "chosen", "rejected")
_FLAGS = ("chosen_finished", "rejected_finished")


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
        return texts | flags | {"messages": json.loads(texts["messages"])}


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

    path = Path(folder) / NAME / _VERSION
    if not path.is_dir():
        raise ValueError(f"{folder} has no pairs ({NAME}/{_VERSION}/): export them with the format tfds")
    return PreferenceSource(tfds.builder_from_directory(path).as_data_source("train"))


def _builder(folder: str | Path, records: Iterable[dict]):
    import tensorflow_datasets as tfds

    # Not registered: TFDS then reads the set from its files, wherever this package is not installed as well.
    class RetmaskPairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(_VERSION)

        def _info(self):
            text, flag = tfds.features.Text(), tfds.features.Scalar(np.bool_)
            return tfds.core.DatasetInfo(
                builder=self, description="Preference pairs: a model's answer and that of its ablated form.",
                features=tfds.features.FeaturesDict(dict.fromkeys(_TEXTS, text) | dict.fromkeys(_FLAGS, flag)),
                disable_shuffling=True,  # item i is pair i
            )  # fmt: skip

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, record in enumerate(records):
                # As JSON text a conversation comes back as it was; TFDS turns a list of turns into two lists.
                messages = json.dumps(record["messages"], ensure_ascii=False)
                yield number, {name: record[name] for name in (*_TEXTS, *_FLAGS)} | {"messages": messages}

    return RetmaskPairs(data_dir=folder, file_format="array_record")
