"""What a run is on disk and in a config: recipes, limits, the work directory, context, and what a stage is; not what
any stage does."""
