"""Tasks, texts and encoders: where they come from, and how a model is given them."""
