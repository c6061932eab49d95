"""From a trace to an evaluated plan: tuning data, solving, held-out evaluation."""
