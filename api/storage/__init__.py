"""Routes of what the service keeps in files: uploads, artifacts and logs of jobs."""
