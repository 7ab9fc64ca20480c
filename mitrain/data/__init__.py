"""Sources of samples: files are read here, checked on the way in, and turned into plain values and pictures."""
