"""Where it runs: Ray actors, job records, storage."""
