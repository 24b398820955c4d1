"""Patches for Megatron-LM checkouts: lines inserted at places found by file, function and anchor.

A patch changes and deletes nothing. `definitions` reads the files in ``patches/``, `places` finds
where lines go in one source text, `checkout` does it to a folder, all or nothing.
"""
