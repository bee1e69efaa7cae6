"""Stages 3 and 4: train a critic (the soft verifier) on the labels, and score samples with it."""
