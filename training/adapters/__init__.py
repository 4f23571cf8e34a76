"""Training of the adapters on a frozen or a tuned backbone."""
