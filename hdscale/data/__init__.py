"""The data room: tasks (row to text), mixtures (tasks to one stream), batches (text to tensors)."""
