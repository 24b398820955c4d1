"""What every trainer shares: document mask, metrics, probe, evaluation, weights."""
