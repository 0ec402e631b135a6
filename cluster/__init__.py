"""Where jobs run and what is kept: Ray actors, the database of jobs, storage."""
