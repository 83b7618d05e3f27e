"""Text from a model: sampling, the generation loop, and the sources of models."""
