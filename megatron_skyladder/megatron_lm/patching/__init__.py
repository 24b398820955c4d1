"""The patch for Megatron-LM checkouts: lines inserted at places found by file, function and anchor.

It changes and deletes nothing. `definitions` reads ``patches/megatron.ini``, `places` finds where
lines go in one source text, `checkout` does it to a folder, all or nothing.
"""
