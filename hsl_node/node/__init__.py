"""The daemon: starts the exchange and the trainer process, and drives the round."""
