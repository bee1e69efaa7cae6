"""Stage 2: the sandbox labels samples."""
