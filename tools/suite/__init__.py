"""The comparison: which runs there are, running them, and the report of what came out."""
