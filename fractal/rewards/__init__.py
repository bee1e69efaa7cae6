"""Rewards for trainers: trl.py, verl.py and verifiers.py hold the functions with their signatures (docs/rewards.md)."""
