"""PMF: prompts that let the last layers of two encoders exchange information (docs/methods/pmf.md)."""
