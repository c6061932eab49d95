"""Rules of routing: a trace in, a trace with other choices out."""
