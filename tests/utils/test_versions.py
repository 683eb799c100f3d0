"""Versions of packages: those that are installed, and one word for those that are not."""

import importlib.metadata

from retmask_jax.utils.versions import NOT_INSTALLED, installed_versions


def test_a_missing_package_is_not_left_out():
    versions = installed_versions(("jax", "no-such-package"))
    assert versions == {"jax": importlib.metadata.version("jax"), "no-such-package": NOT_INSTALLED}
