"""Aurora: low-rank updates that all tuned projections of a model share (docs/methods/aurora.md)."""
