"""The notebooks: running, checking and drawing them, and comparing their results with the claims."""
