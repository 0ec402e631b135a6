"""Records of a job: its rounds and results, the partition of its rows, and the log that makes them durable."""
