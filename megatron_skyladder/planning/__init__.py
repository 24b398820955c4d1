"""What a run will do, worked out before it is launched."""
