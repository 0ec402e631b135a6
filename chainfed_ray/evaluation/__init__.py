"""Evaluates how well the base model with an adapter stack predicts held-out rows."""
