"""One reader per file format; each names file and line of the first fault."""
