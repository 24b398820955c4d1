"""``skyladder demo``: a constant window against SkyLadder, on this machine, in minutes."""
