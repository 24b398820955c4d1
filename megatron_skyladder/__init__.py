"""SkyLadder context-window scheduling for Megatron-LM. Importing this changes nothing."""

__version__ = "0.1.0"
