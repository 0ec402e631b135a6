"""The dry run: it forecasts a job's clients, memory, traffic and duration before anything is trained."""
