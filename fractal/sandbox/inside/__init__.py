"""What runs inside the sandbox container, copied whole into its image; imports nothing outside this package."""
