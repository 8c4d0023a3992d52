"""The analysis room: embeddings, tables of the paper."""
