"""Versions of installed packages, as results and reports record them."""

import importlib.metadata
from collections.abc import Iterable

NOT_INSTALLED = "not installed"


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns {package: version}, with NOT_INSTALLED for a package that is missing."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED
