"""Tasks: data, as examples that a model is trained on and scored on."""
