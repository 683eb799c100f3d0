from retmask_jax.configs import tiny


def get_config():
    config = tiny.get_config()
    config.knockout.modes = ("zero", "mean", "query")
    config.knockout.curve = (1, 2, 4, 8, 16, 0.25, 0.5, 1.0)
    config.knockout.minimal = 0.1
    config.rope.sites = ("rotary", "projection")
    config.rope.utility = True
    config.rope.windows = 8
    config.rope.coverage = (0.25, 0.5, 0.75, 1.0)
    config.rope.patches = True
    config.rope.matched = 3
    config.rope.text = True
    return config
