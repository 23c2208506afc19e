"""The exchange between peers: names, rounds, manifests, tensors, fusion, transport. Knows neither torch nor `train`."""
