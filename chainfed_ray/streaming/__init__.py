"""What is never in memory whole: checkpoints, matrices, embedding tables and saved activations, read in pieces."""
