"""Training against the masked model: pairs, losses, the loop and its checkpoints. No stage and no page."""
