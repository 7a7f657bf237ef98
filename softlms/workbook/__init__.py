"""The notebooks: run, checked, drawn, and held against what is claimed."""
