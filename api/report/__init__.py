"""Shows a job's records to people: as sentences, tables and pictures."""
