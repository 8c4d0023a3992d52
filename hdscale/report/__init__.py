"""Pages that studies and analyses write: their parts, pictures and colours."""
