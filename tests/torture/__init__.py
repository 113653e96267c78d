"""A destination that answers at random, while writers and deliverers are killed."""
