"""Search for rescale factors, start-token windows and attention factors that fit a model."""
