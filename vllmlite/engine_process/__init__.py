"""An engine in another thread or process: client, host, and the messages between them."""
