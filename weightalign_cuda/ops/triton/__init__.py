"""The Triton backend. Nothing here is imported before it is used."""
