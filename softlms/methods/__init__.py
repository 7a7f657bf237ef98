"""What is done to a model: one file or folder a method, each registered in `softlms.methods.registry`."""
