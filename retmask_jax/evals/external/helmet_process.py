"""The process in which HELMET runs, seen from the process that has the model. Its program is `helmet_worker`."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
from jaxtyping import Int32

import retmask_jax
from retmask_jax.utils.files import digest

# HELMET's results depend on these files, and on its arguments other than paths.
CODE = ("arguments.py", "data.py", "model_utils.py", "eval.py", "utils.py")
_PATHS = ("output_dir", "model_name_or_path")
_WORKER = "retmask_jax.evals.external.helmet_worker"


class HelmetProcess:
    """HELMET's process, as a context manager. `use` starts one of HELMET's configs.

    What HELMET prints is in folder/helmet.log. If the process ends early, a ValueError gives the last line of that log.

    Attributes:
        settings: HELMET's arguments.
        entries: The data sets of the config, each with datasets, test_files, demo_files, input_max_length and
            generation_max_length.
        prompts: Tokens of the prompts that came with the last reply.
    """

    def __init__(self, checkout: Path, folder: Path, tokenizer: Any, *, gpu: bool = False) -> None:
        self._checkout, self._gpu = checkout, gpu
        self._tokenizer, self._log = tokenizer, folder / "helmet.log"
        self._kept = folder / "tokenizer"
        self.prompts: list[Int32[np.ndarray, " T"]] = []
        self.settings: dict[str, Any] = {}
        self.entries: list[dict[str, Any]] = []

    @property
    def identity(self) -> str:
        """Hash of HELMET's code and arguments."""
        code = [digest((self._checkout / name).read_bytes()) for name in CODE]
        return digest([code, {name: value for name, value in self.settings.items() if name not in _PATHS}])

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
        assert self._process.stdin is not None and self._process.stdout is not None  # both are pipes
        self._to: IO[str] = self._process.stdin
        self._from: IO[str] = self._process.stdout
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def use(self, config: str, request: dict[str, Any]) -> None:
        """Starts a config, by its path in the checkout; request: "arguments", "stop_new_line" and the "output" folder."""
        Path(request["output"]).mkdir(parents=True, exist_ok=True)
        begun = self.ask(request | {"config": config, "tokenizer": str(self._kept.resolve())})
        self.settings, self.entries = begun["settings"], begun["entries"]

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Sends a message and returns the reply; the prompts that come before the reply are then in `prompts`."""
        try:
            self._to.write(json.dumps(message) + "\n")
            self._to.flush()
        except BrokenPipeError:
            self._ended()
        self.prompts = []
        for line in self._from:
            reply = json.loads(line)
            if "prompt" not in reply:
                return reply
            self.prompts.append(np.frombuffer(base64.b64decode(reply["prompt"]), np.int32))
        self._ended()

    def _environment(self) -> dict[str, str]:
        """Returns this process's environment, changed so that the other process finds this package from any folder."""
        package = str(Path(retmask_jax.__file__).parent.parent)
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
        return os.environ | own | ({} if self._gpu else {"CUDA_VISIBLE_DEVICES": ""})

    def _ended(self) -> NoReturn:
        self._process.wait()
        lines = [line for line in self._log.read_text(encoding="utf-8").splitlines() if line.strip()]
        raise ValueError(
            f"HELMET's process has ended ({lines[-1].strip() if lines else 'no output'}): see {self._log}; it needs what "
            "requirements.txt of its checkout lists"
        )
