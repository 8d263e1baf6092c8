"""Draft and target together, and the record of what was accepted."""
