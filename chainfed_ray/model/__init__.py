"""The frozen base model, run layer by layer, and the adapters that are trained on it."""
