"""The frozen base model, layer by layer, and the adapters that are trained on it."""
