"""harness: bench-and-diagnose for fine-tuning and serving NVIDIA's Nemotron Nano models."""

__version__ = "0.1.0"
