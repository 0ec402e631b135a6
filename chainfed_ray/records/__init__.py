"""What a job leaves behind: its records, what was dealt to whom, and the log that makes them durable."""
