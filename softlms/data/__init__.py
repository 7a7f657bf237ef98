"""Tasks, texts and encoders: where they come from, and how they are fed to a model."""
