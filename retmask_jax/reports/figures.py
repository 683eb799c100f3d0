"""The base of all pictures under its former name, until its last users import it from `plotting`."""

from retmask_jax.reports.plotting import (  # noqa: F401
    MARKERS,
    SHADES,
    colour,
    drawn,
    head_map,
    inline,
    style,
    use_style,
)
