"""What a run is in a config and on disk: recipes, limits, the work directory, results of finished runs."""
