"""The disk tier: key/value blocks in a file that outlives the process."""
