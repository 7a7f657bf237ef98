"""How factors are made, and how many of their components stay."""
