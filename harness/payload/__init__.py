"""What runs inside a pinned environment: it imports nothing of ours but itself and `harness.events`."""
