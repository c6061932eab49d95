"""Predictors of the experts that coming layers will need."""
