"""Plans as the files that serving engines load, one file an engine."""
