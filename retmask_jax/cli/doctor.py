"""`retmask doctor`: whether the package works on this machine as it is, and what to install or to set."""

import dataclasses
import glob
import importlib.util
import os
import platform
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from retmask_jax import __version__
from retmask_jax.generation.language_model import load
from retmask_jax.hf.hub import BUNDLED
from retmask_jax.model.kernels.choice import kernel_for
from retmask_jax.utils import compiled, memory
from retmask_jax.utils.keys import without_secrets
from retmask_jax.utils.progress import track
from retmask_jax.utils.versions import NOT_INSTALLED, installed_versions

# Packages without which nothing works, then optional modules: what each is for, and the extra that installs it.
PACKAGES = ("retmask_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tensorflow-datasets")
EXTRAS = {
    "lm_eval": ("lm-evaluation-harness: `retmask eval --lm_eval=...`", "eval"),
    "pytrec_eval": ("NDCG of the re-ranking suite", "eval"),
    "torch": ("peers of `retmask bench`", "bench"),
    "trl": ("the peer of `retmask bench dpo`", "bench"),
    "transformer_lens": ("a peer of `retmask bench masks --model`", "bench"),
    "nnsight": ("a peer of `retmask bench masks --model`", "bench"),
    "libtpu": ("TPUs, and `retmask train --aot=...` without one", "tpu"),
    "wandb": ("`train.wandb=PROJECT`", None),
}
# The extra with which JAX uses an accelerator, and files that exist where the machine has one.
_SIGNS = {"gpu": ("/dev/nvidia[0-9]*",), "tpu": ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")}
_TIMEOUT = 3.0  # seconds to wait for the hub
_PROMPT, _ANSWER = "<bos> the code for anna : fig oak ash elm yew . the code for anna :", "fig"
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Finding:
    """A line of the page.

    todo: what to do about it; "" for nothing. needed: the package does not work before `todo` is done.
    """

    part: str
    name: str
    value: str
    todo: str = ""
    needed: bool = False


def examine(folder: Path) -> list[Finding]:
    """Examine this machine and return all findings. folder: where results would be written."""
    return [*_software(), *_devices(), *_storage(folder), *_hub(), *_extras()]


def rows(findings: list[Finding]) -> list[tuple[str, str, str, str]]:
    """Rows of the table, (part, name, value, what to do); only the first row of a part names it."""
    parts = [finding.part for finding in findings]
    return [
        ("" if i and parts[i - 1] == finding.part else finding.part, finding.name, finding.value, finding.todo)
        for i, finding in enumerate(findings)
    ]


def failed(findings: list[Finding]) -> list[Finding]:
    """The findings that keep the package from working."""
    return [finding for finding in findings if finding.needed and finding.todo]


def _software() -> list[Finding]:
    found = [Finding("software", "Python", platform.python_version())]
    for package, version in installed_versions(PACKAGES).items():
        if version != NOT_INSTALLED:
            found.append(Finding("software", package, version))
        elif package == "retmask_jax":  # it runs from its folder
            value = f"{__version__}, {NOT_INSTALLED}"
            found.append(Finding("software", package, value, "pip install -e . in its folder"))
        else:
            found.append(Finding("software", package, NOT_INSTALLED, f"pip install {package}", needed=True))
    return found


def _devices() -> list[Finding]:
    try:
        devices = jax.local_devices()
    except RuntimeError as error:  # from JAX, for a platform that was asked for and does not start
        todo = "unset JAX_PLATFORMS, or install the JAX that fits the device (.[gpu], .[tpu])"
        return [Finding("devices", "JAX", f"starts no device: {str(error).splitlines()[0]}", todo, needed=True)]
    kind = devices[0].device_kind
    hosts = f", {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    found = [Finding("devices", jax.default_backend(), f"{len(devices)} x {kind}{hosts}", _unused())]
    found += [_attention(dtype) for dtype in ("float32", "bfloat16")]
    found += [_works(device) for device in track(devices, len(devices), "devices", "device")]
    return [*found, Finding("devices", "free memory", f"{memory.limit() / _GIB:.1f} GiB on the first device")]


def _unused() -> str:
    """What to do if the machine has an accelerator that JAX does not use; "" if it has none."""
    if jax.default_backend() != "cpu":
        return ""
    for extra, patterns in _SIGNS.items():
        if any(glob.glob(pattern) for pattern in patterns):
            return f"this machine has a {extra.upper()} that JAX does not use: pip install 'retmask_jax[{extra}]'"
    return ""


def _attention(dtype: str) -> Finding:
    """The attention kernel for a long prompt on these devices, at the head width of most models."""
    chosen, unsuited = kernel_for(dtype, length=4096, width=128)
    return Finding("devices", f"attention, {dtype}", f"{chosen} kernel" + (f": cuDNN's {unsuited}" if unsuited else ""))


def _works(device: jax.Device) -> Finding:
    """Whether the bundled model copies a word from its prompt on a device."""
    lm = load(BUNDLED)
    tokens = jnp.array([lm.tokenizer(_PROMPT)["input_ids"]])
    with jax.default_device(device):
        lm = lm.replace(params=jax.device_put(lm.params, device))
        generated = np.asarray(lm.generate(tokens, [tokens.shape[1]], max_new_tokens=1).tokens)
    answer = lm.tokenizer.decode(generated[0]).strip()
    update = "jax and jaxlib (and the plug-in of the device) must have the same version: install them again"
    todo = "" if answer == _ANSWER else update
    return Finding("devices", f"device {device.id}", f"the bundled model answers {answer!r}", todo, needed=True)


def _storage(folder: Path) -> list[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {"results": folder, "models of the hub": Path(HF_HUB_CACHE)}
    return [*(_free(name, path) for name, path in places.items()), _programs()]


def _free(name: str, path: Path) -> Finding:
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free / _GIB
    if not os.access(there, os.W_OK):
        return Finding("disk", name, f"{there} cannot be written", "choose a --workdir, or set HF_HOME")
    todo = "" if free > 20 else "a model of 8B takes 16 GB, its checkpoints 3 to 6 times as much"
    return Finding("disk", name, f"{free:.0f} GiB free", todo)


def _programs() -> Finding:
    """What is kept of compiled programs, and its limits."""
    name = "compiled programs"
    folder = compiled.keep_programs()
    if folder is None:
        return Finding(
            "disk", name, "not kept: every run compiles anew", "unset RETMASK_PROGRAMS, or let it name a folder"
        )
    kept = compiled.kept(folder)
    gib, days = compiled.LIMITS
    limits = f"at most {gib:g} GiB, each for {days:g} days after its last use"
    return Finding("disk", name, f"{kept.programs} of {kept.bytes / _GIB:.2f} GiB in {folder}; {limits}")


def _hub() -> list[Finding]:
    from huggingface_hub import constants, get_token

    todo = "" if get_token() else "gated models (Llama, Gemma) need one: HF_TOKEN, or `hf auth login`"
    found = [Finding("hub", "token", "none" if todo else "set", todo)]
    if constants.HF_HUB_OFFLINE:
        return [*found, Finding("hub", "access", "off: HF_HUB_OFFLINE is set; local folders and the cache work")]
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=_TIMEOUT):
            return [*found, Finding("hub", "access", without_secrets(f"{constants.ENDPOINT} answers"))]
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        value = without_secrets(f"{constants.ENDPOINT} does not answer ({reason})")
        return [*found, Finding("hub", "access", value, "the bundled model and local folders need no network")]


def _extras() -> list[Finding]:
    found = []
    for module, (purpose, extra) in EXTRAS.items():
        installed = importlib.util.find_spec(module) is not None
        install = f"pip install 'retmask_jax[{extra}]'" if extra else f"pip install {module}"
        state = "installed" if installed else NOT_INSTALLED
        found.append(Finding("extras", module, f"{state}: {purpose}", "" if installed else install))
    return found
