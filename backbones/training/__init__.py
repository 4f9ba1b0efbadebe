"""What every training run shares, whatever its task."""
