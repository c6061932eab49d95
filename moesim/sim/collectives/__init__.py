"""Ways to send tokens to their experts and back, one file each."""
