"""The process in which HELMET runs, as seen from the one that holds the model; `helmet_worker` is its program."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import retmask_jax
from retmask_jax.utils.files import digest

# What HELMET does depends on these files, and on its arguments but for where things lie.
CODE = ("arguments.py", "data.py", "model_utils.py", "eval.py", "utils.py")
_PLACES = ("output_dir", "model_name_or_path")
_WORKER = "retmask_jax.evals.external.helmet_worker"


class HelmetProcess:
    """HELMET, as a context manager; `use` sets it to one of its configs.

    settings: its arguments; entries: its data sets, each with datasets, test_files, demo_files, input_max_length and
    generation_max_length; prompts: i32[n] each, those that came with the last reply. What it prints is in
    folder/helmet.log. gpu: let it see GPUs. Raises ValueError with the last line of the log where it ends early.
    """

    def __init__(self, checkout: Path, folder: Path, tokenizer, *, gpu: bool = False):
        self._checkout, self._gpu = checkout, gpu
        self._tokenizer, self._log = tokenizer, folder / "helmet.log"
        self._kept = folder / "tokenizer"
        self.prompts: list[np.ndarray] = []
        self.settings: dict[str, Any] = {}
        self.entries: list[dict[str, Any]] = []

    @property
    def identity(self) -> str:
        """Hash of HELMET's code and arguments."""
        code = [digest((self._checkout / name).read_bytes()) for name in CODE]
        return digest([code, {name: value for name, value in self.settings.items() if name not in _PLACES}])

    def __enter__(self) -> "HelmetProcess":
        self._kept.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save_pretrained(self._kept)
        with open(self._log, "a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _WORKER],
                cwd=self._checkout,
                env=self._environment(),
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        return self

    def __exit__(self, *_) -> None:
        self._process.terminate()
        self._process.communicate()

    def use(self, config: str, request: dict[str, Any]) -> None:
        """Go on with a config, by its path in the checkout; request: arguments, stop_new_line and the output folder."""
        Path(request["output"]).mkdir(parents=True, exist_ok=True)
        begun = self.ask(request | {"config": config, "tokenizer": str(self._kept.resolve())})
        self.settings, self.entries = begun["settings"], begun["entries"]

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """The reply to a message; prompts that come before it are put into `prompts`."""
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._ended()
        self.prompts = []
        for line in self._process.stdout:
            reply = json.loads(line)
            if "prompt" not in reply:
                return reply
            self.prompts.append(np.frombuffer(base64.b64decode(reply["prompt"]), np.int32))
        return self._ended()

    def _environment(self) -> dict[str, str]:
        """That of this process; the package is found by the other one wherever it was started from."""
        package = str(Path(retmask_jax.__file__).parent.parent)
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
        return os.environ | own | ({} if self._gpu else {"CUDA_VISIBLE_DEVICES": ""})

    def _ended(self):
        self._process.wait()
        lines = [line for line in self._log.read_text(encoding="utf-8").splitlines() if line.strip()]
        raise ValueError(
            f"HELMET's process has ended ({lines[-1].strip() if lines else 'no output'}): see {self._log}; it needs what "
            "requirements.txt of its checkout lists"
        )
