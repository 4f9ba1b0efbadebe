"""Sample scenes for the demo and the tests: drawn objects of eight classes on real photographs."""
