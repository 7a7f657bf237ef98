"""How factors are computed, and how many of their components are kept."""
