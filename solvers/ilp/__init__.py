"""Integer programs for placement and caching, through PuLP."""
