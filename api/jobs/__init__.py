"""Routes of jobs, and the JSON that they return."""
