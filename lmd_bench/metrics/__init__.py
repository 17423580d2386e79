"""What is computed from a run's raw numbers: time-consumption figures and their intervals, and image quality."""
