"""MoPE: prompts mixed from experts by a router, given the other modality (docs/methods/mope.md)."""
