"""Finished runs, looked at: embeddings, comparisons over seeds, classifiers, the paper's tables."""
