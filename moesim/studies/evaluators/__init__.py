"""Ways to evaluate a point of a study, one file each."""
