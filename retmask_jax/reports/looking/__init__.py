"""The page of one prompt: where heads look while a model predicts its answer; plain HTML that needs no network."""
