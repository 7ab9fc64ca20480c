"""Settings, files, processes and errors: what knows nothing of models, methods or data."""
