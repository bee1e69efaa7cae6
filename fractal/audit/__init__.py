"""Our attack programs against another grader: `fractal audit`."""
