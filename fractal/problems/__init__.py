"""Problem sets by name, the formats of problem files, and the embedded starter set."""
