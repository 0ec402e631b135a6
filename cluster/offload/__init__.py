"""Evaluates the whole model with its weights on disk. Nothing else in the project uses DeepSpeed."""
