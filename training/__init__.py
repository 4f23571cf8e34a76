"""The workshop that makes the weights."""
