"""Files that tenants send to the service, for their jobs to read."""
