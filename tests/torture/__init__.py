"""Torture: writers and delivery workers are killed at random, in front of a destination that answers at random."""
