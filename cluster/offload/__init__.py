"""Evaluation with the model on a disk: all of DeepSpeed, behind one door."""
