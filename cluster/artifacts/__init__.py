"""What a job leaves in its folder for people to have: its log, and the list of what can be downloaded."""
