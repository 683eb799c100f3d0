"""Results of stages to pictures and pages, which are stages themselves; never touches a model."""
