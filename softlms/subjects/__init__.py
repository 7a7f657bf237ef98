"""What ``softlms compress`` works on: a classifier and its task, or a language model and its text."""
