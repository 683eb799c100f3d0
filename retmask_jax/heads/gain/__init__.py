"""Where a gain lives: two checkpoints of one architecture, compared weight by weight and grafted onto each other."""
