"""The host's side of the sandbox: its container, and the client that sends it samples."""
