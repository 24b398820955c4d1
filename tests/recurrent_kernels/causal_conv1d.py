"""Stands for the package of this name, imported and not called; see plain_recurrence.py."""

__version__ = "1.5.3.post1"
causal_conv1d_fn = None
