"""Losses, augmentation, schedules and optimisers: what training is made of, in plain torch."""
