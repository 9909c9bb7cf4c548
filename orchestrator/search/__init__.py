"""What is tried next: Optuna, samplers, rounds of confirming, rows."""
