"""What is computed on: memory held to a cap, its peak, and threads."""
