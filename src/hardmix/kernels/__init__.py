"""Inner loops: the pure torch form of each, and faster ones picked by what the device can do."""
