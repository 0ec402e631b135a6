"""What a job leaves in its folder for people to have: cards, and the list of what can be downloaded."""
