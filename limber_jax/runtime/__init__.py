"""What every long-running program needs: devices and processes, signals, locks, files, streams, and what is logged."""
