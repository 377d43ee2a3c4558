"""Recording demonstrations: where they start, how they are chained, and the files they are written to."""
