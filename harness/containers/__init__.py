"""Container images of the pinned environments: what stands in their lock, how they are built, and what is in them."""
