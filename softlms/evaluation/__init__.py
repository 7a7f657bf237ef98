"""How good a model is: metrics of classifiers, perplexity, zero-shot accuracy."""
