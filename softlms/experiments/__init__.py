"""Stored runs, and the measurements behind the tables; not for the library's users."""
