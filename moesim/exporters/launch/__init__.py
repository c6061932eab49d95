"""What starts a service: launch lines and settings files of each engine, and its benchmark."""
