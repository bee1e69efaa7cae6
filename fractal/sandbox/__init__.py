"""The hard verifier: untrusted programs run against their tests in a container without network."""
