"""MRQA's twelve question-answering sets."""
