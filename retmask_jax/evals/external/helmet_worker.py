"""The program that runs HELMET's code, in a process that `helmet` starts in HELMET's checkout.

HELMET's modules have names such as `data` and `utils`, need torch, and fork, so they run apart from the JAX model.
HELMET's unmodified code loads the data, writes and tokenizes the prompts and scores the answers. This process sends the
token ids to its parent, the process with the model, and receives the answers. Both send lines of JSON:

    parent: {"config", "arguments", "stop_new_line", "tokenizer", "output"}     child: {"settings", "entries"}
    parent: {"entry": number, "citations": bool}    child: {"prompt": ids in base64} ..., {"generate": settings}
    parent: {"answers": [{"output", ...} or null, ...]}     child: {"scored", "ids", "output"} or {"failed": why}
"""

import base64
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

# Lists in HELMET's configs with an item for each data set; a single item is for all data sets.
_LISTS = ("datasets", "test_files", "demo_files", "input_max_length", "generation_max_length")


class _Parent:
    """The process that has the model. What HELMET prints to stdout goes to stderr."""

    def __init__(self) -> None:
        self._in = sys.stdin
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def ask(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """Sends a message and returns the answer; None if the process has ended."""
        self.send(message)
        return self.read()

    def read(self) -> dict[str, Any] | None:
        line = self._in.readline()
        return json.loads(line) if line else None

    def send(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()


def main() -> None:
    """Runs HELMET's configs and data sets as the parent asks, until it ends."""
    parent = _Parent()
    sys.path.insert(0, os.getcwd())
    request, args, entries, model = parent.read(), None, [], None
    while request is not None:
        if "config" in request:
            args, entries = _plan(request)
            model = _bridge(parent, args, request["tokenizer"])
            reply = {"settings": _plain(args), "entries": entries}
        else:
            reply = _run(args, model, entries[request["entry"]], request["citations"])
        request = parent.ask(reply)


def _plain(args) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if isinstance(value, (str, int, float, type(None)))}


def _plan(request: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """Returns HELMET's arguments and the data sets of the config, as HELMET's parser reads them."""
    from arguments import parse_arguments

    sys.argv = ["eval.py", "--config", request["config"], "--output_dir", request["output"], *request["arguments"]]
    args = parse_arguments()
    # HELMET's configs have a key stop_new_line, which its code does not read.
    args.stop_newline = args.stop_newline or (request["stop_new_line"] and bool(getattr(args, "stop_new_line", False)))
    columns = [str(getattr(args, name)).split(",") for name in _LISTS]
    n = len(columns[0])
    columns = [column * n if len(column) == 1 else column for column in columns]
    rows = [dict(zip(_LISTS, row, strict=True)) for row in zip(*columns, strict=True)]
    for row in rows:
        row |= {name: int(row[name]) for name in ("input_max_length", "generation_max_length")}
    return args, rows


def _bridge(parent: _Parent, args, tokenizer: str):
    """Returns a model as HELMET wants it, whose answers come from the parent."""
    import model_utils
    import transformers

    class Bridge(model_utils.LLM):
        def __init__(self):
            super().__init__(
                args.model_name_or_path,
                temperature=args.temperature,
                top_p=args.top_p,
                do_sample=args.do_sample,
                stop_newline=args.stop_newline,
                use_chat_template=args.use_chat_template,
                system_message=args.system_message,
            )
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                tokenizer, local_files_only=True, trust_remote_code=False
            )
            self.answered: list[int] = []

        def prepare_inputs(self, test_item, data):
            return model_utils.tokenize(
                test_item,
                data,
                tokenizer=self.tokenizer,
                max_length=self.max_length,
                generation_max_length=self.generation_max_length,
                use_chat_template=self.use_chat_template,
                system_message=self.system_message,
            )

        def generate(self, inputs=None, prompt=None, **kwargs):
            return self.generate_batch(None if inputs is None else [inputs], None if prompt is None else [prompt])[0]

        def generate_batch(self, inputs=None, prompt=None, **kwargs):
            if inputs is None:
                inputs = [self.tokenizer([text]) for text in prompt or []]
            rows = [np.asarray(encoded["input_ids"][0], np.int32) for encoded in inputs]
            for row in rows:
                parent.send({"prompt": base64.b64encode(row.tobytes()).decode()})
            reply = parent.ask(
                {
                    "generate": {
                        "max_new_tokens": self.generation_max_length,
                        "until": self.stops or [],
                        "temperature": self.temperature if self.do_sample else 0.0,
                        "top_p": self.top_p,
                    }
                }
            )
            if reply is None:
                sys.exit(1)
            self.answered = [i for i, answer in enumerate(reply["answers"]) if answer is not None]
            excerpts = [self._excerpt(row) for row in rows]
            return [
                None if answer is None else answer | {"input_text": excerpt, "input_len": len(row)}
                for answer, excerpt, row in zip(reply["answers"], excerpts, rows, strict=True)
            ]

        def _excerpt(self, row, ends: int = 500) -> str:
            if len(row) <= 2 * ends:
                return self.tokenizer.decode(row)
            return f"{self.tokenizer.decode(row[:ends])} <skip> {self.tokenizer.decode(row[-ends:])}"

    return Bridge()


def _run(args, model, entry: dict[str, Any], citations: bool) -> dict[str, Any]:
    """Generates and scores one data set; an error in HELMET is returned, not raised."""
    import eval as helmet_eval

    for name in _LISTS:
        setattr(args, name, entry[name])
    model.max_length, model.generation_max_length = entry["input_max_length"], entry["generation_max_length"]
    try:
        path = helmet_eval.run_test(args, model, entry["datasets"], entry["test_files"], entry["demo_files"])
        samples = json.loads(Path(path).read_text())["data"]
        if "alce" in entry["datasets"]:
            samples = [sample | _alce(entry["datasets"], sample, citations) for sample in samples]
    # HELMET reads files of many kinds and uses clients of servers; their errors have no common base class.
    except Exception as error:
        logging.getLogger(__name__).exception("HELMET failed on %s", entry["datasets"])
        return {"failed": _why(error)}
    return {"scored": _numbers(samples), "ids": model.answered, "output": str(Path(path).resolve())}


def _alce(dataset: str, sample: dict[str, Any], citations: bool) -> dict[str, float]:
    """Scores one answer with HELMET's program for ALCE, as shares; its scores of a data set are means of these."""
    import eval_alce

    kind = "qampari" if "qampari" in dataset else "asqa"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{kind}.json"
        path.write_text(json.dumps({"data": [sample]}))
        eval_alce.main(["--f", str(path), "--no_rouge", *(["--citations"] if citations else [])])
        scores = json.loads(Path(f"{path}.score").read_text())
    return {name: value / 100 for name, value in scores.items() if isinstance(value, (int, float))}


def _numbers(samples: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Returns {metric: a value for each sample} of every field that is a number or a boolean in some sample."""
    names = dict.fromkeys(k for sample in samples for k, v in sample.items() if isinstance(v, (bool, int, float)))
    return {name: [_number(sample.get(name)) for sample in samples] for name in names}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (bool, int, float)) and value == value else None


def _why(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


if __name__ == "__main__":
    main()
