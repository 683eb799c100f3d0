"""Pairs read and written in the forms that others use: JSONL of RetMask and TRL, and TFDS sets for Grain."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.data.chat import record_id, turns
from retmask_jax.utils.files import iter_jsonl, matching, write_jsonl

SIDES = ("chosen", "rejected")


def read_pairs(source: str | Path) -> list[dict]:
    """Returns every pair of the JSONL files (.gz or not) that a path or glob names, as a list; see `iter_pairs`."""
    return list(iter_pairs(source))


def iter_pairs(source: str | Path) -> Iterator[dict]:
    """Yields pairs {id, messages, chosen, chosen_finished, rejected, rejected_finished} from JSONL files.

    chosen_stop and rejected_stop, the ids that ended the answers, are included if the line has them. A line is such a
    record; or {conversation_id, chosen, rejected} with whole conversations, as RetMask has it; or {prompt, chosen,
    rejected} with texts or turns, as TRL has it. An answer is finished unless its record says otherwise. The
    reasoning_content of a turn is put before its content, in the tags that Qwen3 uses.

    Args:
        source: A path or glob, .gz or not.

    Raises:
        ValueError: A line, named by file and number, is in none of these forms.
    """
    for path in matching(Path(source)):
        for number, stored in iter_jsonl(path):
            try:
                yield _pair(stored, f"{path.name}:{number}")
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def write_released(path: str | Path, records: Iterable[dict]) -> None:
    """Writes pairs as RetMask's DPO script and TRL read them: {conversation_id, chosen, rejected}, whole conversations.

    Further fields, which TRL ignores, tell `read_pairs` whether the answers are finished and which ids ended them.

    Raises:
        ValueError: The answers of a pair are equal; TRL would then not find the end of the prompt.
    """
    write_jsonl(Path(path), map(_released, records))


def _released(record: dict) -> dict:
    if record["chosen"] == record["rejected"]:
        raise ValueError(f"pair {record['id']!r} has the same answer twice: demonstrations are not pairs")
    sides = {side: [*record["messages"], {"role": "assistant", "content": record[side]}] for side in SIDES}
    finished = {f"{side}_finished": record[f"{side}_finished"] for side in SIDES}
    return {"conversation_id": record["id"]} | sides | finished | _stops(record)


def _pair(stored: Any, default_id: str) -> dict:
    if not isinstance(stored, dict) or not set(SIDES) <= set(stored):
        has = ", ".join(stored) if isinstance(stored, dict) else f"a {type(stored).__name__}"
        raise ValueError(f"a pair needs chosen and rejected; the line has {has}")
    apart = stored.get("messages", stored.get("prompt"))
    prompt, chosen = _conversation("chosen", stored["chosen"], apart)
    other_prompt, rejected = _conversation("rejected", stored["rejected"], apart)
    if prompt != other_prompt:
        raise ValueError("chosen and rejected differ before their last turn: a pair has one prompt")
    finished = {side: _flag(stored, f"{side}_finished") for side in SIDES}
    return {
        "id": record_id(stored, default_id),
        "messages": prompt,
        "chosen": chosen,
        "chosen_finished": finished["chosen"],
        "rejected": rejected,
        "rejected_finished": finished["rejected"],
    } | _stops(stored)


def _conversation(side: str, stored: Any, apart: Any) -> tuple[list[dict], str]:
    """(prompt, answer) of one side; apart: the prompt, if the record has a separate field for it."""
    prompt = [] if apart is None else list(turns(apart))
    before, answer = ([], stored) if isinstance(stored, str) else _split(side, stored)
    if before and prompt and before != prompt:
        raise ValueError(f"the prompt differs from the beginning of the conversation in {side}")
    if not before and not prompt:
        raise ValueError(f"{side} holds the answer only: messages or prompt is needed, too")
    return before or prompt, answer


def _split(side: str, stored: Any) -> tuple[list[dict], str]:
    """(turns before the answer, answer) of a conversation."""
    conversation = list(turns(stored)) if isinstance(stored, list) else []
    if not conversation or conversation[-1]["role"] != "assistant":
        raise ValueError(f"{side} is no text and no conversation that ends with an assistant turn")
    answer = conversation[-1]["content"]
    if reasoning := stored[-1].get("reasoning_content"):
        answer = "<think>\n{}\n</think>\n\n{}".format(str(reasoning).strip("\n"), answer.lstrip("\n"))
    return conversation[:-1], answer


def _stops(stored: dict) -> dict[str, int]:
    """The ids that ended the answers, if the record has them."""
    stops = {name: stored[name] for name in (f"{side}_stop" for side in SIDES) if stored.get(name) is not None}
    for name, value in stops.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} is {value!r}, not a token id")
    return stops


def _flag(stored: dict, name: str) -> bool:
    value = stored.get(name, True)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, not true or false")
    return value


NAME = "retmask_pairs"
FORMATS = ("released", "tfds")

_VERSIONS = ("1.1.0", "1.0.0")  # the version that is written, and an older one without stop ids that is still read
_TEXTS = ("id", "messages", "chosen", "rejected")
_FLAGS = ("chosen_finished", "rejected_finished")
_STOPS = ("chosen_stop", "rejected_stop")  # ids that ended the answers
_NO_STOP = -1


@dataclasses.dataclass(frozen=True)
class PreferenceSource:
    """Pairs by index, as `grain.MapDataset.source` takes them; `stored` is the data source of TFDS."""

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
    """Writes pairs of `read_pairs`.

    Args:
        format: "released" for a JSONL file, see `write_released`; "tfds" for a folder, see `build_dataset`.
    """
    if format not in FORMATS:
        raise ValueError(f"pairs are not written as {format!r}: choose {' or '.join(FORMATS)}")
    write = write_released if format == "released" else build_dataset
    write(out, records)


def build_dataset(folder: str | Path, records: Iterable[dict]) -> None:
    """Writes the TFDS set `retmask_pairs` into a folder, pair i of the records as its item i.

    `preference_source(folder)` reads it, and so does tfds.data_source("retmask_pairs", split="train", data_dir=folder).

    Raises:
        ValueError: The folder has such a set already.
    """
    if (Path(folder) / NAME).exists():
        raise ValueError(f"{folder} has pairs already ({NAME}/): name another folder, or remove them")
    _builder(folder, records).download_and_prepare()


def preference_source(folder: str | Path) -> PreferenceSource:
    """Returns the pairs that `build_dataset` wrote into a folder; ValueError if there are none."""
    import tensorflow_datasets as tfds

    paths = [path for version in _VERSIONS if (path := Path(folder) / NAME / version).is_dir()]
    if not paths:
        raise ValueError(f"{folder} has no pairs ({NAME}/{_VERSIONS[0]}/): export them with the format tfds")
    builder: Any = tfds.builder_from_directory(paths[0])
    return PreferenceSource(builder.as_data_source("train"))


def _builder(folder: str | Path, records: Iterable[dict]):
    import tensorflow_datasets as tfds

    # Not registered, so that TFDS can read the set from its files where this package is not installed.
    class RetmaskPairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(_VERSIONS[0])

        def _info(self):
            text, flag, stop = tfds.features.Text(), tfds.features.Scalar(np.bool_), tfds.features.Scalar(np.int64)
            features = dict.fromkeys(_TEXTS, text) | dict.fromkeys(_FLAGS, flag) | dict.fromkeys(_STOPS, stop)
            return tfds.core.DatasetInfo(
                builder=self,
                description="Preference pairs: a model's answer and that of its ablated form.",
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,  # item i is pair i
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, record in enumerate(records):
                # As JSON text a conversation comes back as it was; TFDS turns a list of turns into two lists.
                messages = json.dumps(record["messages"], ensure_ascii=False)
                stops = {name: record.get(name, _NO_STOP) for name in _STOPS}
                yield number, {name: record[name] for name in (*_TEXTS, *_FLAGS)} | {"messages": messages} | stops

    return RetmaskPairs(data_dir=folder, file_format="array_record")
