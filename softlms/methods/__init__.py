"""Compression methods: one file or folder per method, each registered in `softlms.methods.registry`."""
