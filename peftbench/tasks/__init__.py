"""Tasks: data as the examples on which a model is trained and scored."""
