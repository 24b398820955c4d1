"""Text -> Megatron's .bin/.idx, and a look at what is in them. Nothing here needs Megatron."""
