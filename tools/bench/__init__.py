"""The benchmark: contestants on the same inputs in one run, none with a speed unless its results were right."""
