"""The exchange between peers: rounds, manifests, transport, inbox, journal. Knows neither torch nor `train`."""
