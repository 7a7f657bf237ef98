"""What a saved folder says, and how it is read again."""
