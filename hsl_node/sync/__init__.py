"""The exchange between peers: round, signed documents, connections, inbox, journal. Knows neither torch nor `train`."""
