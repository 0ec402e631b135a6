"""Before anything runs: from a job's document to what can run, and the dry run, which forecasts what that would be like."""
