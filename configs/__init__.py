"""Recipes shipped with the package; `retmask STAGE --config=NAME` finds them by name."""
