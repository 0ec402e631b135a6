"""Routes of jobs, of the files that they read and of those that they leave."""
