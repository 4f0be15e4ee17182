"""The machine a run is on: what it is, whether it computes rightly, how fast it is."""
