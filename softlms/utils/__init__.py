"""What every room uses: files, range checks, the machine, imports that wait."""
