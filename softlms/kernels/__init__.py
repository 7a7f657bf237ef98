"""Our own code, where a library's is too slow or missing."""
