"""What the three tasks share: errors for users, safe files, run logs, measurements, skipped images."""
