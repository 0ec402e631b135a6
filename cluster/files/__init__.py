"""Files that come and go: those that tenants send for their jobs to read, and those that a job leaves for people."""
