"""What a job says: its document, section by section, and what contradicts what."""
