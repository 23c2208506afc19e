"""The exchange between peers: names, rounds, manifests, tensors, fusion, transport. Imports neither torch nor `train`."""
