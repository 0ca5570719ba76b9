"""A model and tasks -> what it answers, and what the answers are worth."""
