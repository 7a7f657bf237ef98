"""Runs that are stored and found again, and what is measured for the tables; not for the library's users."""
