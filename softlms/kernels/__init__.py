"""Code of our own where a library's is too slow or is missing."""
