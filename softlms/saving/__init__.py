"""Save compressed models to folders, and load them again."""
