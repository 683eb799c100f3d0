"""A bucket mounted as a folder, as far as programs notice: no folder can be renamed, and new files are listed late.

`python tests/helpers_bucket.py ROOT SECONDS ARGUMENT...` is `retmask ARGUMENT...` with ROOT being such a mount.
"""

import os
import sys
import time
from pathlib import Path


def mount(root: Path, late: float, patch=setattr) -> None:
    """Make a folder one whose folders cannot be renamed and whose new entries are listed `late` seconds after they came.

    A file that is asked for by its name is there at once. patch: sets an attribute; a monkeypatch's is undone.
    """
    root, made = str(Path(root).resolve()), {}
    rename, replace, mkdir, scandir, listdir = os.rename, os.replace, os.mkdir, os.scandir, os.listdir

    def inside(path) -> bool:
        return not isinstance(path, int) and f"{os.path.abspath(os.fspath(path))}/".startswith(f"{root}/")

    def files_only(function):
        def moved(old, new, **options):
            if (inside(old) or inside(new)) and os.path.isdir(old):
                raise OSError(95, "a folder cannot be renamed here", os.fspath(old))
            return function(old, new, **options)

        return moved

    def noted(path, *arguments, **options):
        mkdir(path, *arguments, **options)
        made[os.path.abspath(os.fspath(path))] = time.time()

    def is_listed(path: str) -> bool:
        since = made.get(path, 0.0) if os.path.isdir(path) else os.lstat(path).st_mtime
        return time.time() - since >= late

    class Listing:
        """What os.scandir gives, without the entries that are not listed yet."""

        def __init__(self, path):
            self._all = scandir(path)
            self._entries = (entry for entry in self._all if is_listed(os.path.abspath(entry.path)))

        def __iter__(self):
            return self._entries

        def __next__(self):
            return next(self._entries)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.close()

        def close(self):
            self._all.close()

    def listed(path="."):
        names = listdir(path)
        return [n for n in names if is_listed(os.path.join(os.path.abspath(path), n))] if inside(path) else names

    patch(os, "rename", files_only(rename))
    patch(os, "replace", files_only(replace))
    patch(os, "mkdir", noted)
    patch(os, "scandir", lambda path=".": Listing(path) if inside(path) else scandir(path))
    patch(os, "listdir", listed)


if __name__ == "__main__":
    mount(Path(sys.argv[1]), float(sys.argv[2]))
    from retmask_jax.cli.main import main

    sys.exit(main(sys.argv[3:]))
