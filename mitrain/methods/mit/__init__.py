"""MiT: features infused into the attention and the feed-forward of the text model (docs/methods/mit.md)."""
