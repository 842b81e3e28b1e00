"""Pages of docs/ that are written from the code: each a function from nothing to its text."""
