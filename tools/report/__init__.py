"""The report of a comparison: its table, curves, sweeps, examples and learned functions, in one self-contained page."""
