"""Settings that must stand before any test module is imported."""

import os

# Tiny models on a busy machine: OpenMP threads that wait by spinning take minutes of it. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
