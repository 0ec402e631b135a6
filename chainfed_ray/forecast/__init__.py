"""Before anything runs: what a job would be like."""
