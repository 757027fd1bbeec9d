"""Show what came out: of one run, a sweep or a comparison, in the terminal and as a page."""
