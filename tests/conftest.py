"""Settings that must stand before any test module is imported."""

import os
import signal

# Tiny models on a busy machine: OpenMP threads that wait by spinning take minutes of it. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Package builds name a proxy that refuses everything, to keep tests from the network; servers here are on loopback.
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"

# A shell that starts the tests in the background has them ignore what the tests of Ctrl-C send.
signal.signal(signal.SIGINT, signal.default_int_handler)
