"""Windows, clock, fragments, key exchange, costs: arithmetic, standard library and numpy."""
