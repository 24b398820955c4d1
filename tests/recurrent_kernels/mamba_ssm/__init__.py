"""Stands for the package of this name; see plain_recurrence.py."""

__version__ = "2.2.6.post3"
