"""What engines on one's own machine can run: placements that they can express, memory, speed."""
